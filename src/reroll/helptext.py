"""What `reroll COMMAND --help` says about each command."""

DEMO = """\
Train the packaged demo policy (1M parameters, Qwen3 architecture) on chain sums it has never
seen, on this machine, and print held-out reward before and after. Takes a few minutes on two
CPU cores. Starting it again goes on where it stopped."""

TRAIN = """\
Train a policy. CONFIG is a TOML file (see recipes/ in the repository); every setting can also be
given as a flag, which wins over the file. Starting again with the same command goes on from the
last checkpoint; the run that was killed and started again is the run that was not killed.

  reroll train recipes/chain_sum.toml
  reroll train recipes/own_data.toml --model.path Qwen/Qwen3-0.6B --task.name problems.jsonl
  reroll train recipes/chain_sum.toml --run.out runs/b --algo.name gspo
  reroll train recipes/ppo.toml --train.learning_rate 5e-5"""

EVAL = """\
Evaluate a policy on its task's held-out problems: mean reward, pass@k, maj@k, greedy, each with a
95 % bootstrap interval over problems. TARGET is a run directory (its newest checkpoint) or a
configuration file. The last line is one JSON object.

  reroll eval runs/demo
  reroll eval runs/demo --step 20 --eval.samples 16
  reroll eval runs/prune --vote confidence --eval.samples 16
  reroll eval recipes/chain_sum.toml --task.eval_size 500"""

COLLECT = """\
Sample every training problem until it is solved once, or given up. Those that take more than
collect.screen attempts are hard ones, and how they were solved (the traces) is where training with
prefix.on starts from. Says what that cost, and whether starting from a prefix can pay at all: how
many groups of rollouts have unequal rewards with a prefix and without. Starting again with the same
command goes on where it stopped. The last line is one JSON object.

  reroll collect recipes/prefix.toml --out traces.sqlite
  reroll collect recipes/prefix.toml --collect.screen 64 --collect.cap 512
  reroll train recipes/prefix.toml --prefix.traces traces.sqlite"""

SIMULATE = """\
Compare schedules before renting the machines: the collector of a run on an engine without a model,
which only counts what ticks cost and how long replies are. Times are a roofline's (no schedule
beats it, real engines reach less), a measured run's or constants of your own; memory is not
checked, rollouts and updates take turns, and what stale tokens do to learning is not simulated.
CONFIG is a TOML file of the settings below, which are flags too and win over it.

  reroll simulate                                       one H100 with a model of 7.6e9 parameters
  reroll simulate --gpu l4 --parameters 1.5e9 --slots 64 --median 800 --cap 8192
  reroll simulate --replicas 1,4,16 --prompts 256 --out simulate.png
  reroll simulate --run runs/a --costs runs/a --slots 16   lengths and costs of a recorded run
  reroll simulate --schedules april --over 2 --slots 32 --prompts 8 --timeline timeline.png

Columns: trained tokens per second of rollouts and updates, the same over sync's, share of slot time
that was idle while collecting, tokens drawn and not trained on, trained tokens of older weights,
most updates a token was behind, tokens read again over trained, mean length trained on over that
of all that was started, updates from a prompt's admission to its training, seconds an update."""
