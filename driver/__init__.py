"""The pretraining driver: `python driver/pretrain.py --help`."""
