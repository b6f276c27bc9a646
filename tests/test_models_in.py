"""Models in: what is accepted, what is refused before any weight is read, and GGUF conversion."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from httpx_free import response_like  # noqa: F401
