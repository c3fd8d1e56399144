"""The section on the profiler: each cause that was put in beside the ones that it named."""

from collections import Counter

from benchmarks.page_tables import Shown, table


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
