"""Pages and plots of what commands found, made from their `--json` documents alone.

page.py          templates to one self-contained HTML file (the home of jinja2)
charts.py        where bars, points and lines lie, as plain numbers; templates draw them
plot.py          the same as PNG (the home of matplotlib)
sensitivity.py   the page of `twofour sensitivity`; another page is such a file and a template
run.py           the page of a run: each part of it is a file `run_*.py` and a template
graph.py         graphs in ranks, graph_places.py where they lie: columns, lines
histograms.py    tensors and their histograms, for the pages of quantize and of a run
outcomes.py      a run's document as an `Outcome`, whatever of it there is
quantities.py    times, sizes and shares in words, with their units
"""
