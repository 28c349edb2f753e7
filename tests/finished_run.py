"""A run directory as a short run leaves it, for the report."""

from __future__ import annotations

from pathlib import Path

from megatron_distil.config.load import load_config, to_json
from megatron_distil.metrics.sinks import JsonLines

ATTACK = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


def write_run(folder: Path, *, future: str = "sum", num_steps: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config("two_roads", [f"objective.future={future}", f"train.num_steps={num_steps}"])
    (folder / "config.json").write_text(to_json(config))
    (folder / "versions.json").write_text('{"torch": "2.13.0"}')
    metrics, samples = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "samples.jsonl")
    metrics.append(0, {"eval/avg_at_8": 0.25, "eval/pass_at_8": 0.5, "eval/first_road_share": 0.375})
    for step in range(num_steps):
        metrics.append(
            step,
            {
                "loss/ce_nats": 2.0 - step / num_steps,
                "train/grad_norm": 1.0,
                "sync/logprob_gap_nats": 1e-6,
                "time/collect_s": 2.0,
                "time/teach_s": 0.5,
                "time/update_s": 1.0,
                "time/publish_s": 0.25,
                "time/step_s": 4.0,
                "time/tokens_per_s": 300.0,
            },
        )
        samples.append(step, _sample(step))
        if (step + 1) % 10 == 0:
            metrics.append(step + 1, {"eval/avg_at_8": 0.75, "eval/pass_at_8": 1.0, "eval/first_road_share": 0.875})


def _sample(step: int) -> dict[str, object]:
    return {
        "rollout": f"{step}/train-00000/0",
        "version": step,
        "prompt": "4721>",
        "response": ATTACK,
        "finish": "stop",
        "outcome": "failed",
        "reward": 0.0,
        "feedback": "538",
        "context": "4721?538>",
        "demonstration": None,
        "tokens": [
            {"text": "(", "student": -0.7, "teacher": -0.69, "best": "x", "best_prob": 0.5},
            {"text": "9", "student": -2.3, "teacher": None, "best": "5", "best_prob": 0.99},
            {"text": "\n", "student": -0.01, "teacher": -0.01, "best": "\n", "best_prob": 0.99},
        ],
    }
