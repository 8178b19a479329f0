"""A sweep over learning rates from Python: train, compare, and let the best model write.

    python examples/train_from_python.py examples/quickstart.yaml train.num_steps=20

The first argument is a run spec; the others change fields of it, as --set does.
"""

import sys

import trimaran as tm

path, *overrides = sys.argv[1:]
runs = {}
for lr in (1e-3, 3e-3):
    spec = tm.load_spec(path, [*overrides, f"optimizer.lr={lr}", f"train.output_dir=runs/lr-{lr:g}"])
    runs[lr] = tm.train(spec)  # a run that is there already, whole or in part, goes on where it stands

for lr, run in runs.items():
    evaluations = run.evaluations()
    held_out = evaluations[-1]["held_out_loss"] if evaluations else None
    print(f"lr {lr:g}: step {run.step}, loss {run.metrics()[-1]['loss']:.4f}, held out {held_out}")

best = min(runs.values(), key=lambda run: run.metrics()[-1]["loss"])
print(f"best: {best.folder}, report {best.report}")
print(tm.generate(best, "To be", max_new_tokens=40)[0])
