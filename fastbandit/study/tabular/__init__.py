"""Studies on a table of true accuracies: policies, composed searches and their baselines."""
