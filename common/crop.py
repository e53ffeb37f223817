"""The centre crop of ADM, which every ImageNet paper of this family uses."""

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """PIL image of any size => its central square, (size, size, 3) uint8.

    ADM's rule: halve by box filter while the shorter side is at least 2 size, then bicubic until it is size, then cut the
    middle. A smaller image is enlarged.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
