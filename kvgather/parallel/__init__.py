"""One model, or one context, on several GPUs: what a rank holds, and how partial results become one."""
