"""The whole job on scikit-learn's handwritten digits: `bash quickstart.sh`."""
