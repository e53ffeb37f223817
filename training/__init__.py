"""What train.py is made of: the plan, the step, the state, signals, tracking, previews."""
