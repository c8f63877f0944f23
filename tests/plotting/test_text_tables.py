"""Tables as text, Markdown and HTML."""

from utils.plotting import text_tables

ROWS = [["benchmark", "masks", "gIoU"], ["a|b", "12", "0.5"], ["<c>", "3", "-"]]


def test_aligned_text_ends_without_spaces():
    assert text_tables.aligned(ROWS, "lr") == [
        "benchmark  masks  gIoU",
        "a|b           12   0.5",
        "<c>            3     -",
    ]
    assert text_tables.aligned(ROWS, "lrl")[1:] == ["a|b           12  0.5", "<c>            3  -"]
    assert text_tables.aligned([], "l") == []


def test_a_bar_in_a_cell_does_not_split_it_in_markdown():
    assert text_tables.markdown(ROWS).splitlines() == [
        "| benchmark | masks | gIoU |",
        "| --- | --- | --- |",
        "| a\\|b | 12 | 0.5 |",
        "| <c> | 3 | - |",
    ]


def test_markdown_may_be_aligned_in_the_source():
    assert text_tables.markdown(ROWS, "lr").splitlines() == [
        "| benchmark | masks | gIoU |",
        "|-----------|------:|-----:|",
        "| a\\|b      |    12 |  0.5 |",
        "| <c>       |     3 |    - |",
    ]


def test_html_is_escaped():
    table = text_tables.html(ROWS)
    assert table.startswith("<table>\n<tr><th>benchmark</th><th>masks</th><th>gIoU</th></tr>\n<tr><td>a|b</td>")
    assert "<td>&lt;c&gt;</td>" in table


def test_columns_come_in_the_order_they_are_first_seen():
    rows = text_tables.from_mappings([{"name": "a", "n": 1}, {"name": "b", "m": 2}], lambda column, value: f"{value}")
    assert rows == [["name", "n", "m"], ["a", "1", "None"], ["b", "None", "2"]]
    assert text_tables.from_mappings([], lambda column, value: "") == [[]]


def test_a_mean_has_its_deviation_if_there_are_several_values():
    assert text_tables.mean_cell([1.0, 2.0], 2) == "1.50 ± 0.71"
    assert text_tables.mean_cell([1.0], 1) == "1.0"
