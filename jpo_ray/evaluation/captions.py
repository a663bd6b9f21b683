"""What stands above a chart's file, since a file has no page around it: its title and a legend."""

import textwrap
from collections.abc import Mapping

from jpo_ray.evaluation.charts import POINTS_PER_INCH, WIDTH, blank, inlined
from jpo_ray.evaluation.looks import Look, shortened

TITLE_LENGTH = 52  # characters of a line of bold text
KEY_LENGTH = 52  # of a name that has a line for itself


def caption(name: str, title: str, keys: Mapping[str, Look]) -> str:
    """Title and legend as a drawing of their own, for `charts.standalone`: in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    with blank(name, height=100) as figure:
        handles = [Line2D([], [], label=shortened(text, KEY_LENGTH), **look) for text, look in keys.items()]
        for columns in (4, 3, 2, 1):
            legend = figure.legend(
                handles=handles, ncols=columns, loc="upper left", frameon=False, alignment="left", borderaxespad=0,
                title="\n".join(textwrap.wrap(title, TITLE_LENGTH)),
                title_fontproperties={"weight": "bold", "size": 11},
            )  # fmt: skip
            figure.draw_without_rendering()
            extent = legend.get_window_extent()
            if columns == 1 or extent.width <= WIDTH:
                break
            legend.remove()
        figure.set_size_inches(WIDTH / POINTS_PER_INCH, extent.height / POINTS_PER_INCH)
        return inlined(figure, name, title)
