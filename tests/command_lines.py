"""Command lines that people type, and their outcomes.

The tests try them, and

    PYTHONPATH=src python tests/command_lines.py

runs ``python src/train.py --cfg job ARGUMENTS`` for each, and prints the first line of an error, or "accepted". Sweeps
are run with ``train.episodes=0``, which fails in each job if the command line is accepted.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What is typed, and a regular expression for the error; None: it is accepted.
PARSED: dict[tuple[str, ...], str | None] = {
    # Special characters.
    ("way=[1,2",): r"way=\[1,2 cannot be parsed",
    ("data_dir=a(b",): r"quote it: 'data_dir=\"a\(b\"'",
    ("data_dir=/my data (1)/x",): r"quote it: 'data_dir=\"/my data \(1\)/x\"'",
    ("data_dir=/a=b",): r"quote it: 'data_dir=\"/a=b\"'\n  data_dir=/a=b\n {13}\^ mismatched input '='",
    ("data_dir=/a#b",): r"quote it: 'data_dir=\"/a#b\"'\n  data_dir=/a#b\n {13}\^",
    ("data_dir=/鸟",): r"quote it: 'data_dir=\"/鸟\"'\n  data_dir=/鸟\n {12}\^",
    ("data_dir=/a [x]",): r"quote it: 'data_dir=\"/a \[x\]\"'",
    ("data_dir=it's",): "quote it: 'data_dir=\"it'",
    ("data_dir={a",): r"quote it: 'data_dir=\"{a\"'",
    ("data_dir=a&b",): r"quote it: 'data_dir=\"a&b\"'",
    ("data_dir=a;b",): r"quote it: 'data_dir=\"a;b\"'",
    ("data_dir=é/ü",): r"quote it: 'data_dir=\"é/ü\"'",
    ("data_dir=a,b",): r"has several values: add -m to run one job for each, or quote .*: 'data_dir=\"a,b\"'",
    ('data_dir="/my data (1)/x"',): None,
    ('data_dir="/a=b#c,鸟"',): None,
    ("data_dir=C:\\data",): None,
    ("data_dir=/a b/c",): None,
    ("data_dir=/a+b-c_d@e%f",): None,
    # Settings typed as options, or with spaces.
    ("--way", "5"): r"--way is not an option; settings are typed without dashes: way=5$",
    ("--way=5",): r"typed without dashes: way=5$",
    ("-way", "5"): r"typed without dashes: way=5$",
    ("-seed", "3"): r"typed without dashes: seed=3$",
    ("--train.way", "3"): r"typed without dashes: train\.way=3$",
    ("--checkpoint-every", "5"): r"typed without dashes: checkpoint_every=5$",
    ("shot=1", "--way", "5"): r"typed without dashes: way=5$",
    ("--pictures", "shot=1"): r"typed without dashes: pictures=VALUE$",
    ("way", "5"): r"way has no value; type way=5$",
    ("way=", "5"): r"way= and 5 are two arguments; type way=5, without a space$",
    ("way:5",): r"way:5 has no value; type way=5$",
    ("way",): r"way has no value; type way=VALUE$",
    ("method", "maml"): r"method has no value; type method=maml$",
    ("--config-dir",): r"--config-dir/-cd: expected one argument",
    ("--cfg", "everything"): r"invalid choice: 'everything'",
    ("--cfg", "hydra", "--resolve"): r"type --cfg all --resolve --package hydra$",
    # Order.
    ("way=5", "-m", "shot=1,2"): None,
    ("-m", "way=5", "shot=1,2"): None,
    ("way=5", "shot=1,2", "--multirun"): None,
    ("way=5", "--config-dir", ".", "shot=1"): None,
    ("~callbacks",): None,
    ("shot=1,2",): r"shot=1,2 has several values: add -m",
    ("method=protonet,maml",): r"method=protonet,maml has several values: add -m",
}
COMPOSED: dict[tuple[str, ...], str | None] = {
    ("shot=[1,2]",): r"shot=\[1,2\] is a list, and shot takes one value; to run one job for each: -m shot=1,2",
    ("way=[5]",): r"way=\[5\] is a list, .*: -m way=5",
    ("optimizer.lr=[0.1,0.01]",): r"optimizer\.lr=\[0\.1,0\.01\] is a list|^$",
    (
        "-m",
        "method=protonet,maml",
        "method.order=1,2",
    ): r"method\.order is a setting of method=maml only; .*: -m method=m",
    ("-m", "method=maml,protonet", "method.order=1,2"): r"method\.order is a setting of method=maml only",
    ("-m", "method=maml,protonet", "method.order=1"): r"method\.order is a setting of method=maml only",
    ("-m", "encoder=conv4,resnet12", "encoder.filters=8,16"): r"encoder\.filters is a setting of encoder=conv4 only",
    ("-m", "method=protonet,matching", "train.way=5,20"): None,
    ("-m", "distance=l2,cosin"): r"distance=cosin is not an option.*did you mean cosine\?",
    ("-m", "distance=cosin,l2"): r"distance=cosin is not an option.*did you mean cosine\?",
    ("experiment=omniglot/protonet",): None,
    ("experiment=omniglot/protone",): r"Choose one of .*miniimagenet/\.\.\., .*did you mean omniglot/protonet\?",
    ("experiment=omniglot/protonet_5way_1shot",): None,
    ("experiment=nothing",): r"Choose one of matching_distance/\.\.\., .*omniglot/\.\.\.",
    (
        "encoder=resnet",
    ): r"Choose one of best, conv4, conv4_signed, fast, lite0, pretrained, resnet12, timm \(did you mean resnet12\?\)",
    (
        "dataset=cifar",
    ): r"Choose one of cifar_fs, cub, fc100, folder, glyphs, miniimagenet, omniglot, tieredimagenet, torchvision",
    (
        "hydra.launcher.n_jobs=2",
    ): r"hydra\.launcher\.n_jobs is not in .*; to add it anyway, type \+hydra\.launcher\.n_jobs=2",
    (
        "hydra/launcher=basic",
        "hydra.launcher.ray.init.num_cpus=2",
    ): r"to add it anyway, type \+hydra\.launcher\.ray\.init\.num_cpus=2",
    ("hydra.job.env_set.A=1",): r"to add it anyway, type \+hydra\.job\.env_set\.A=1",
    ("logger=null",): r"logger=null is not an option\. Choose one of csv, .*did you mean none\?",
    ("logger=[{a:1}]",): r"logger=\[{a:1}\] is not an option\. Choose one of csv, ",
    ("transform=5",): r"transform=5 is not an option\. Choose one of ",
    ("-m", "distance=l2,null"): r"distance=null is not an option\. Choose one of cosine, l2, scaled_cosine",
    ("-m", "method=maml,null", "method.order=1"): r"method=null is not an option",
    ("resume=run", "dataset.source.split_seed=3"): r"if the resumed run's dataset has it, type \+dataset\.source",
    ("wya=5",): r"'wya'.*did you mean way\?",
    ("--config-dir", "nowhere", "way=5"): r"names nowhere, which does not exist",
    ("--config-dir=nowhere", "way=5"): r"names nowhere, which does not exist",
    ("--config-path", "/mine", "--config-name", "mine"): r"add yours with --config-dir /mine$",
}


def situations() -> Iterator[tuple[str, ...]]:
    yield from PARSED
    yield from COMPOSED
    yield ("--cfg", "all", "--resolve")
    yield ("--cfg", "job", "--resolve")


def main() -> None:
    """Print the table."""
    train = next(Path(path) / "train.py" for path in sys.path if (Path(path) / "train.py").is_file())
    for arguments in situations():
        sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
        more = ["train.episodes=0"] if sweep else [] if "--cfg" in arguments else ["--cfg", "job"]
        done = subprocess.run([sys.executable, train, *more, *arguments], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        accepted = done.returncode == 0 or (sweep and "train.episodes=0 must be" in done.stderr)
        outcome = "accepted" if accepted else lines[0] if lines[0].startswith("error") else lines[-1]
        sys.stdout.write(f"{' '.join(arguments)}\t{outcome}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
