"""Text of others is shown as what it is."""

from lorabench.utils import formats


def test_foreign_text_keeps_to_its_line_and_its_letters():
    # An escape sequence of a terminal, a line that GitHub would obey, a byte that is no UTF-8, a mark that turns text.
    name = "Größe 模型\x1b[31m\n::error::\udce9\u202e"
    assert formats.printable(name) == r"Größe 模型\x1b[31m\n::error::\udce9\u202e"
