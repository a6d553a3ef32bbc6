"""What first_light.py writes of results.json for people: results.md."""

from __future__ import annotations

from typing import Any

CONVOLUTIONS = ("conv_bias_act", "conv_stats", "conv_backward")


def markdown(found: dict[str, Any]) -> str:
    """The results as text: how each stage ended, what was reached, and of what."""
    machine = found.get("machine", {})
    lines = [f"# {machine.get('device', 'First light')}", ""]
    if "versions" in machine:
        v, c = machine["versions"], machine["config"]
        lines += [f"{machine['date']}, torch {v['torch']}, triton {v['triton']}, "]
        lines[-1] += f"{c['model']}, batch {c['batch']}, {c['size']} px"
    if "int8_per_s" in machine:
        lines += ["", f"Copy {machine['bytes_per_s'] / 1e12:.2f} TB/s, "]
        lines[-1] += f"bf16 {machine['flops_per_s'] / 1e12:.0f} TFLOP/s, int8 {machine['int8_per_s'] / 1e12:.0f} TOP/s."
    lines += ["", "| stage | ended | seconds | remarks |", "|---|---|---|---|"]
    for name, part in found.items():
        lines.append(f"| {name} | {part.get('status', 'runs')} | {part.get('seconds', '')} | {remarks(part)} |")
    networks = {k: v for stage in ("headline", "planned") for k, v in found.get(stage, {}).items() if ": " in k}
    if networks:
        lines += ["", "| network | images/s | CUDA graph | peak GB | remarks |", "|---|---|---|---|---|"]
    for key, row in networks.items():
        lines.append(f"| {key} | {' | '.join(network_cells(row))} |")
    rows = found.get("kernels", {}).get("rows", [])
    if rows:
        lines += ["", "| signature | chosen | ms | roofline ms | share | aten ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        ms, ideal = row["ms"][row["chosen"]], row.get("roofline_ms")
        share = f"{ideal:.4f} | {ideal / ms:.0%}" if ideal is not None else "– | –"
        lines.append(f"| {row['signature']} | {row['chosen']} | {ms:.4f} | {share} | {row['ms']['aten']:.4f} |")
    lines += convolutions(rows)
    own = found.get("sm90_conv", {}).get("rows", [])
    if own:
        lines += ["", "| conv_train_sm90 | ms | cuDNN's convolution alone, ms |", "|---|---|---|"]
    lines += [f"| {row['case']} | {row['ms']:.4f} | {row['cudnn_conv_ms']:.4f} |" for row in own]
    return "\n".join(lines) + "\n"


def remarks(part: dict[str, Any]) -> str:
    """What did not go well in a stage, on one line."""
    said = [part["unavailable"]] if part.get("unavailable") else []
    for results in (part.get("primitives", {}), part.get("cases", {})):
        said += [f"{what}: {text}" for what, text in results.items() if not text.startswith(("ok", "declined"))]
    said += [
        f"{k}: {v['status']}: {v['note']}"
        for k, v in part.items()
        if isinstance(v, dict) and v.get("status") == "failed"
    ]
    return "; ".join(said).replace("\n", " ").replace("|", "/")[:600]


def network_cells(row: dict[str, Any]) -> list[str]:
    """Images per second without a graph and with one, memory, remarks."""
    rates = [f"{row['images_per_s']['median']:.1f}" if "images_per_s" in row else "–"]
    rates.append(f"{row['graph']['images_per_s']['median']:.1f}" if "graph" in row else "–")
    peak = f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") is not None else "–"
    said = "; ".join(filter(None, (row["note"], row.get("graph_note"))))
    return [*rates, peak, said.replace("\n", " ").replace("|", "/")[:300]]


def convolutions(rows: list[dict[str, Any]]) -> list[str]:
    """The best time of every backend for each convolution, side by side."""
    table = [(row["signature"], by_backend(row["ms"])) for row in rows if row["primitive"] in CONVOLUTIONS]
    names = sorted({name for _, best in table for name in best})
    if not table:
        return []
    lines = ["", f"| convolution, ms | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for signature, best in table:
        times = (f"{best[name]:.4f}" if name in best else "–" for name in names)
        lines.append(f"| {signature} | {' | '.join(times)} |")
    return lines


def by_backend(ms: dict[str, float]) -> dict[str, float]:
    """The best of a backend's configurations; CUTLASS's tiles, which are those of ``cuda``, by themselves. A gradient
    of conv_backward that was measured by itself comes as "input: triton", the best pair as "apart"."""
    best: dict[str, float] = {}
    for label, time_ms in ms.items():
        part, _, choice = label.rpartition(": ")
        name = "cutlass" if "cutlass" in choice else choice.split(" ")[0]
        name = "apart" if part == "apart" else f"{part}: {name}" if part else name
        best[name] = min(time_ms, best.get(name, time_ms))
    return best
