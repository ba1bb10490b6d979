"""Pages and plots of what commands found, made from their `--json` documents alone.

page.py          templates to one self-contained HTML file (the home of jinja2)
charts.py        where bars, points and lines lie, as plain numbers; templates draw them
plot.py          the same as PNG (the home of matplotlib)
sensitivity.py   the page of `twofour sensitivity`; another page is such a file and a template
"""
