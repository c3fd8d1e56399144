"""The sections on the profiler and the tuner: causes that were put in beside those that were named, settings beside the best."""

from collections import Counter

from benchmarks.page_tables import Shown, number, table


def show_profile_faults(name: str, result: dict) -> Shown:
    rows = []
    for fault, outcomes in result["faults"].items():
        named = Counter(outcome["named"] for outcome in outcomes)
        tried = [outcome["tried"] for outcome in outcomes if outcome.get("tried")]
        gains = ", ".join(f"{one['option']}: {one['predicted']:,.0f} and {one['achieved']:,.0f}" for one in tried)
        right = sum(outcome["right"] for outcome in outcomes)
        rows.append([fault, f"{right} of {len(outcomes)}", ", ".join(named), gains])
    errors = [abs(error) for error in result["prediction_errors"]]
    lines = [f"{result['right']} of {result['of']} right, each profiled for about {result['seconds']:.0f} s."]
    if errors:
        lines[0] += (
            f" Of {len(errors)} fixes that were applied {sum(e <= 0.1 for e in errors)} gained within 10 % what was predicted."
        )
    header = ["put in", "right", "named", "images/s predicted and achieved by the fix"]
    return Shown([*lines, "", *table(header, rows)], {})


def show_tune(name: str, result: dict) -> Shown:
    best = result["best_of_sweep"]
    rows = [["the best of the sweep", best, number(result["sweep_s"]), len(result["swept"]), 1.0]]
    rows += [["the defaults", "", "", "", result["defaults_of_best"]]]
    for count, row in enumerate(result["tunings"], 1):
        rows.append([f"tuning {count}", row["chosen"], number(row["seconds"]), row["settings_tried"], row["of_best"]])
    near = sum(row["within_3_percent"] for row in result["tunings"])
    lines = [
        f"{near} of {len(result['tunings'])} tunings came within 3 % of the best of {len(result['swept'])} settings. A window "
        f"scatters by {result['noise_of_a_window']:.1%}; {result['records']:,} records, batches of {result['batch_size']}."
    ]
    return Shown([*lines, "", *table(["", "settings", "seconds", "settings tried", "of the best"], rows)], {})
