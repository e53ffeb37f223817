"""The paper's ablation on real images, with seeds and error bars: `python -m study digits`."""
