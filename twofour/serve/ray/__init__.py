"""The same repository on a Ray cluster: replicas of each model, behind a front on every node."""
