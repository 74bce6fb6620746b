"""The set-up of the tests of several ranks: no network, quiet logs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import transformers

transformers.logging.set_verbosity_error()
