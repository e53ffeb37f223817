"""One small test for each situation of a public bug report, named after the situation."""
