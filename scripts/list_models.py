"""Lists every network, static and with the paper's experts: its cost, and what the paper printed.

python scripts/list_models.py
"""

from absl import flags

from scripts import command

_JSON = flags.DEFINE_bool("json", False, "Print JSON: a list of objects.")


def main(_: list[str]) -> None:
    """Builds and counts each network; multiply-adds are for one image of 224×224."""
    command.import_backend()
    import functools

    from condconv.cost import count_unbuilt
    from condconv.tools import tables
    from models import create_model
    from models.paper import PAPER

    rows = []
    for published in PAPER:
        network = functools.partial(
            create_model, published.model, num_experts=published.num_experts
        )
        cost = count_unbuilt(network)
        rows.append(
            {
                "name": published.model,
                "num_experts": published.num_experts,
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
                "macs": cost.macs,
                "paper_multiply_adds": published.multiply_adds and published.multiply_adds * 10**6,
                "paper_top1": published.top1,
            }
        )
    tables.show(rows, _JSON.value)


if __name__ == "__main__":
    command.run(main)
