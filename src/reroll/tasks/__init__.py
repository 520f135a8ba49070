"""Where problems come from and how completions are graded."""
