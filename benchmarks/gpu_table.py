"""The table of gpu.py: what, figure, and the goal on one H200 with 16 cores, of what the parts have noted."""

from collections.abc import Iterator

Row = tuple[str, str, str]
BIG_BATCH = 1024  # at which nets are compared


def rows(found: dict[str, dict]) -> Iterator[Row]:
    for part, show in SHOWN.items():
        yield from show(found.get(part, {}))


def figure(value: object, unit: str = "") -> str:
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def speed(row: object) -> str:
    return figure(row["images_per_second"], " images/s") if isinstance(row, dict) else figure(row)


def ceilings(notes: dict) -> Iterator[Row]:
    for name, value in notes.items():
        if isinstance(value, dict):
            yield name, ", ".join(f"{key} {figure(part)}" for key, part in value.items()), ""
        elif "FLOP/s" in name:
            yield name.replace(" FLOP/s", ""), figure(value / 1e12, " TFLOP/s"), ""
        elif "bytes/s" in name:
            yield name.replace(" bytes/s", ""), figure(value / 1e9, " GB/s"), ""
        else:
            yield name, figure(value), ""


def loader(notes: dict) -> Iterator[Row]:
    for name, row in notes.items():
        if name.startswith("compared: "):
            yield f"loader, {name.removeprefix('compared: ')}", speed(row), ""
    if "best" in notes:
        settings = ", ".join(f"{name} {value}" for name, value in notes["best"]["settings"].items())
        yield "loader, best settings", settings, ""
    yield "loader, of decode only", figure(notes.get("of decode only")), "0.90"
    for name in ("this loader at DALI's defaults", "DALI's own reader, its defaults"):
        yield f"loader, times {name}", figure(notes.get(f"times {name}")), "1.3"
    thread = notes.get("training thread", {})
    yield "loader, reading in the training thread", figure(thread.get("microseconds an image"), " us an image"), ""


def tune(notes: dict) -> Iterator[Row]:
    yield "tuner, of the sweep's best", figure(notes.get("of the sweep")), "0.97"
    yield "tuner, time", figure(notes.get("seconds"), " s"), "60"


def training(notes: dict) -> Iterator[Row]:
    best: dict[str, float] = {}
    for name, row in notes.items():
        net, batch, _ = name.split(", ")
        words = speed(row)
        if isinstance(row, dict):
            words += f", MFU {figure(row.get('mfu'))}, {figure(row.get('of the roofline'))} of the roofline"
            if batch == f"batch {BIG_BATCH}":
                best[net] = max(best.get(net, 0.0), row["images_per_second"])
        yield f"training, {name}", words, "60,000" if f"{net}, {batch}" == f"alexnet-owt, batch {BIG_BATCH}" else ""
    if {"alexnet", "alexnet-owt"} <= best.keys():
        yield "training, alexnet of alexnet-owt", figure(best["alexnet"] / best["alexnet-owt"]), "0.85"


def together(notes: dict) -> Iterator[Row]:
    for name, row in notes.items():
        if isinstance(row, dict) and "of synthetic" in row:
            words = f"{speed(row['together'])}, {figure(row['of synthetic'])} of synthetic"
            words += f", {figure(row['of the smaller'])} of the smaller, {row['data wait']:.1%} waiting"
            yield f"together, {name}", words, "0.98 of synthetic" if "cache" in name else "0.95 of the smaller"
        elif ": " in name:
            yield f"together, {name}", speed(row), ""


def verdicts(notes: dict) -> Iterator[Row]:
    for name, row in notes.items():
        told = f"{row['named']} ({'right' if row['right'] else 'WRONG'})" if isinstance(row, dict) else str(row)
        yield f"verdict, {name}", told, ""


def learning(notes: dict) -> Iterator[Row]:
    for name, row in notes.items():
        if isinstance(row, dict) and "errors" in row:
            errors = ", ".join(f"{views} {figure(found['top1_error'], ' %')}" for views, found in row["errors"].items())
            yield f"learning, {name}", f"top-1 error {errors}; {figure(row['seconds'], ' s')}", ""
        elif not isinstance(row, dict):
            yield f"learning, {name}", str(row), ""


def rescale(notes: dict) -> Iterator[Row]:
    for name, row in notes.items():
        yield f"rescale, {name}", speed(row), ""


SHOWN = {
    "ceilings": ceilings,
    "loader": loader,
    "tune": tune,
    "training": training,
    "together": together,
    "verdicts": verdicts,
    "learning": learning,
    "rescale": rescale,
}
