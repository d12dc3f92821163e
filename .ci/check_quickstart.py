"""Check what the quickstart left: every file of the contract, a student that loads, and that it learned."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

FILES = [
    *("config.yaml", "reflections.parquet", "plan.json", "checkpoints"),
    *("student", "metrics.jsonl", "summary.json", "report.html"),
]

folder = Path(sys.argv[1])
missing = [name for name in FILES if not (folder / name).exists()]
assert not missing, f"missing in {folder}: {missing}"
AutoModelForCausalLM.from_pretrained(folder / "student")
results = json.loads((folder / "summary.json").read_text())["evaluation"]
for name, r in results.items():
    kl = "" if r["kl"] is None else f"{r['kl']:.3f}"
    print(f"{name:8} ROUGE-L {100 * r['rouge_l']:5.1f}   cross-entropy {r['cross_entropy']:.3f}   KL {kl}")
start, student = results["start"], results["student"]
assert student["kl"] < 0.9 * start["kl"], "the distilled student is not closer to its teacher"
assert student["cross_entropy"] < 0.9 * start["cross_entropy"], "the distilled student is not better on held-out rows"
