"""What the workbook dissects: the gather as it was, and the tools that show what is wrong with it.

Nothing outside lab, workbook and tests imports this. `fence` and `trace` are general tools: they work on
anyone's Triton kernel.
"""
