"""Images with natural statistics for the tests."""

import numpy as np
from skimage import data


def photo(height: int = 150, width: int = 200, index: int = 0) -> np.ndarray:
    """``(height, width, 3)`` uint8 window of a photograph."""
    image = (data.astronaut, data.chelsea, data.coffee)[index % 3]()
    return np.ascontiguousarray(image[20 * index : 20 * index + height, 40 : 40 + width])
