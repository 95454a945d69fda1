"""What a stream of bytes leaves on a terminal's screen: enough of one for tqdm's and rich's bars."""

import io
import re

_TOKEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Stream(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def screen(text):
    """The lines that a terminal shows after ``text``."""
    lines, row, column = [""], 0, 0
    for token in _TOKEN.findall(text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b["):
            code, count = token[-1], token[2:-1]
            if code == "A":
                row = max(row - int(count or 1), 0)
            elif code == "K":
                lines[row] = "" if count == "2" else lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]
