import pytest
import torch


def pytest_collection_modifyitems(items):
    """GPU tests skip where there is no CUDA device, unless `-m gpu` asks for them (then their failure tells so)."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and item.config.option.markexpr != "gpu":
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
