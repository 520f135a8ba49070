"""Rollouts: what is started, collected, graded and given to the trainer."""
