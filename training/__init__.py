"""The parts of train.py: settings, plan, set-up, optimiser step, checkpoints, health, previews, probe and tracking."""
