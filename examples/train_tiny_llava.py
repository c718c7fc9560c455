"""Train a tiny LLaVA in both stages on a CPU, reload it with transformers, and ask it something.

Run:
    python examples/train_tiny_llava.py --output runs/example                 # some minutes
    python examples/train_tiny_llava.py --output runs/example --steps 2 2     # seconds; it learns nothing
    python examples/train_tiny_llava.py --output runs/example --fuser concat
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText

from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.evaluation import read_image, read_questions
from integrations.llava.inference.predictor import load_predictor
from integrations.llava.synthetic import make_dataset
from integrations.llava.training.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/example"), help="folder for data and run")
    parser.add_argument("--fuser", default="mmfuser", help="name of a fuser")
    parser.add_argument("--num-train", type=int, default=2000, help="training images")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("PRETRAIN", "FINETUNE"), help="default: the recipe's")
    args = parser.parse_args()

    data = make_dataset(args.output / "data", seed=0, num_train=args.num_train, num_val=1, num_test=4)
    overrides: dict[str, object] = {
        "model.fuser": args.fuser,
        "pretrain.data.path": str(data / "pretrain.json"),
        "pretrain.data.image_folder": str(data / "images"),
        "finetune.data.path": str(data / "train.json"),
        "finetune.data.image_folder": str(data / "images"),
    }
    if args.steps:
        overrides |= {"pretrain.max_steps": args.steps[0], "finetune.max_steps": args.steps[1]}
    run = train(load_recipe("tiny", overrides), args.output / "run", overwrite=True)

    model = AutoModelForImageTextToText.from_pretrained(run)
    print(f"reloaded {type(model).__name__} with fuser {model.config.fuser['name']}")

    predictor = load_predictor(run)
    for question in read_questions(data / "test.jsonl")[:5]:
        answer = predictor([read_image(data / "images" / question.image)], [question.text])[0]
        print(f"{question.text}  right: {question.answer}  answered: {answer!r}")


if __name__ == "__main__":
    main()
