"""Ask a model in stock onnxruntime-genai, with any number of loops that its folder has a graph for."""

import argparse
import json
from pathlib import Path

import onnxruntime_genai as og


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="written by melt-edge export onnx --layout genai")
    parser.add_argument("question")
    parser.add_argument("--loops", type=int, help="default: as trained")
    options = parser.parse_args()

    config = og.Config(str(options.folder))
    if options.loops is not None:
        config.overlay((options.folder / f"loops-{options.loops}.json").read_text(encoding="utf-8"))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    pieces = tokenizer.create_stream()
    prompt = tokenizer.apply_chat_template(
        messages=json.dumps([{"role": "user", "content": options.question}]), add_generation_prompt=True
    )
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(tokenizer.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        print(pieces.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
