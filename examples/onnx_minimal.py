"""Run a folder of `melt-edge export onnx` with onnxruntime and numpy alone: the whole contract in one file.

Usage: python examples/onnx_minimal.py FOLDER "The prompt"    (text needs the package tokenizers)
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


class LoopModel:
    """The graphs of a folder and the K/V state that they overwrite in place. Batch 1."""

    def __init__(self, folder, num_loops=None):
        self.about = json.loads((Path(folder) / "melt_edge.json").read_text(encoding="utf-8"))
        self.sessions = {n: ort.InferenceSession(Path(folder) / f"{n}.onnx") for n in self.about["graphs"]}
        self.inputs = {spec["name"]: spec for spec in self.about["graphs"]["loop"]["inputs"]}
        # Loops to run; tokens in the cache; its tensors, made at their first use
        self.num_loops, self.length, self.slots = num_loops or self.about["num_loops"], 0, {}

    def append(self, tokens):
        """Evaluate tokens, cut into chunks as the model was trained; returns the last one's logits [V]."""
        step = self.about["chunk_size"] or len(tokens)  # null for Ouro, which chunks do not change
        for i in range(0, len(tokens), step):
            x = self.run_chunk(tokens[i : i + step])
        return self.sessions["head"].run(["logits"], {"x": x.numpy()[:, -1:]})[0][0, 0]

    def run_chunk(self, tokens):
        """All loops over one chunk; its rows stay in the cache. Returns the last loop's states [1, C, D]."""
        (x,) = self.sessions["embed"].run(["x"], {"input_ids": np.array([tokens], np.int64)})
        self.length += len(tokens)
        count = np.array(self.length, np.int32)
        state = {"x": value(x)}  # x and the gate's latents h, which start as zeros; overwritten by every loop
        state |= {name: value(np.zeros_like(x)) for name in self.inputs if name.startswith("h.")}
        for loop_idx in range(self.num_loops):
            feeds = {"seqlens_k": value(count[None] - 1), "total_sequence_length": value(count)}
            feeds |= {"first_loop": value(np.array(loop_idx == 0))} if "first_loop" in self.inputs else {}
            bound = self.sessions["loop"].io_binding()
            for name, tensor in {**state, **feeds, **self.rows(loop_idx)}.items():
                bound.bind_ortvalue_input(name, tensor)
                if name not in feeds:  # the output in the same memory: x_out, h_out.i, present.i.key and .value
                    kind, dot, rest = name.partition(".")
                    bound.bind_ortvalue_output({"past": "present"}.get(kind, f"{kind}_out") + dot + rest, tensor)
            bound.bind_output("exit_prob")
            self.sessions["loop"].run_with_iobinding(bound)
        return state["x"]

    def rows(self, loop_idx):
        """A loop's cache: MELT has one for all loops, Ouro one for each. past.*: [1, Hkv, n_ctx, Dh]."""
        slot = 0 if self.about["architecture"] == "melt" else loop_idx
        if slot not in self.slots:
            past = {n: ([1, *v["shape"][1:]], v["dtype"]) for n, v in self.inputs.items() if "past" in n}
            self.slots[slot] = {name: value(np.zeros(*made)) for name, made in past.items()}
        return self.slots[slot]


def value(array):
    """An array as onnxruntime binds it."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def greedy(model, tokens, max_tokens=64):
    """Yield the likeliest next tokens until the model ends. All tokens must fit into n_ctx."""
    logits = model.append(tokens)
    while max_tokens and (token := int(logits.argmax())) != model.about["eos_token_id"]:
        yield token
        max_tokens -= 1
        logits = model.append([token])


if __name__ == "__main__":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    print(tokenizer.decode(list(greedy(LoopModel(sys.argv[1]), tokenizer.encode(sys.argv[2]).ids))))
