"""Writes ``c_core/src/unicode_classes.h``: which characters are letters, numbers, white space and punctuation.

    python c_core/tools/unicode_classes.py > c_core/src/unicode_classes.h

The properties are those of the ``regex`` package, whose patterns define the words that ``c_core/src/words.c`` finds.
"""

from __future__ import annotations

from itertools import groupby

import regex

CLASSES = (("LETTER", r"\p{L}", 1), ("NUMBER", r"\p{N}", 2), ("SPACE", r"\s", 4), ("PUNCTUATION", r"[\p{P}$+<=>^~|]", 8))


def main() -> None:
    characters = [chr(point) for point in range(0x110000)]
    class_of = dict.fromkeys(characters, 0)
    for _, pattern, bit in CLASSES:
        for character in regex.findall(pattern, "".join(characters)):
            class_of[character] |= bit

    print("/* unicode_classes.h - written by c_core/tools/unicode_classes.py; not to be edited. */")
    print("#include <stdint.h>\n")
    for name, pattern, bit in CLASSES:
        print(f"#define {name} {bit} /* {pattern} */")
    print("\n/* Where the class changes: the first code point << 4 | its class, which holds up to the next entry. */")
    print("static const uint32_t CLASS_CHANGES[] = {")
    changes = [ord(next(group)) << 4 | key for key, group in groupby(characters, class_of.__getitem__)]
    for i in range(0, len(changes), 12):
        print("    " + " ".join(f"{change:#x}," for change in changes[i : i + 12]))
    print("};")


if __name__ == "__main__":
    main()
