"""From text to statistics: what the inputs of every layer look like on real tokens.

Text becomes batches of tokens (`calibration.text.data`), a walk runs them through the model block by
block, and sums over what passes become the statistics that compressors use.
"""

from calibration.errors import InputError

__all__ = ["InputError"]
