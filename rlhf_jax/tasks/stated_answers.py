r"""The answer that a text states, and the number that it is, exactly.

A stated answer is what follows the last of "####" (as GSM8K writes it), \boxed{…}, <answer>, and
"answer is" or "answer:" in any case, behind the last </think> if there is one. Needs the standard
library only, as a worker's code does.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_LONGEST = 500  # characters of a number
_LARGEST = 400  # of an exponent of ten, either way
_MARKER = re.compile(
    r"####\s*(?=[^\w\s]{0,8}\d)(?!\d+[.)]\s*[^\W\d])"  # a heading's "#### 2. Then" states nothing
    r"|\\f?boxed\s*\{|\\fbox\s*\{|<answer>"
    r"|\banswer(?:\s+(?:to|of|for)\b[^.!?:\n]{0,80}?)?"
    r"(?:\s+(?:is|are|was|equals|(?:would|will|should|must)\s+be)\b(?!\s+not\b)|\W{0,4}[:=])",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[\s:*$=(]*[^\n]*?(?=\n|[.!?](?:\s|$)|$)")
_FRACTION = re.compile(
    r"\\[cdt]?frac\s*(?:\{\s*(-?\d+(?:\.\d+)?)\s*\}|(\d))\s*(?:\{\s*(\d+(?:\.\d+)?)\s*\}|(\d))"
)
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_NAMES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SPACES = " \u00a0\u2009\u202f"
_GROUPED = (
    r"\d{1,3}(?:\.\d{3})+,\d+(?![\d,])|\d{1,3}(?:\.\d{3}){2,}(?![.\d])"
    r"|(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}"
    rf"|\d{{1,3}}(?:[{_SPACES}'’]\d{{3}})+)(?!\d)(?:\.\d+)?"
)
_EXPONENT = (
    r"(?:[eE](?P<e>[-+]?\d+)(?!\w)|\s?(?:×|\*|x|\\times|\\cdot|·)\s?10\^\{?(?P<times>[-+]?\d+)\}?)"
)
_NUMBER = re.compile(
    # What has digits and is no number: dates, times, versions, powers but those of ten, exponents,
    # fractions of letters.
    r"(?P<other>(?<![\d.])(?:\d+(?:/\d+){2,}|\d{4}-\d\d?-\d\d?(?!\d)|\d+(?::\d+)+"
    r"|(?!\d{1,3}(?:\.\d{3}){2,}(?![.\d]))\d+(?:\.\d+){2,}"
    r"|(?!10\^)\d+(?:\.\d+)?(?:\s?\^\s?|\*\*)[{(]?-?\d+[})]?)"
    r"|\\[cdt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|\^[{(]?-?\d+[})]?|\\sqrt\s*\{?\s*\d+|√\s?\d+)"
    r"|(?P<sign>(?<![\w.)\]}%])[-+])?(?P<money>[$€£¥₹]-?)?(?<![\da-wyz_])(?:"
    rf"(?:(?P<mixed>\d+)[{_SPACES}]+)?(?P<top>\d+(?:\.\d+)?)\s?[/⁄]\s?(?P<under>\d+(?:\.\d+)?)"
    r"|10\^\{?(?P<power>[-+]?\d+)\}?"
    rf"|(?P<whole>{_GROUPED}|\d+(?:\.\d+)?|(?<!\w)\.\d+){_EXPONENT}?"
    r"(?:\s(?P<name>(?i:thousand|million|billion|trillion))\b)?)"
)
_SEPARATED = re.compile(
    rf"(?<![\d.,])(?P<whole>{_GROUPED})|(?<!\w)(?P<base>\d+(?:\.\d+)?){_EXPONENT}"
)
_MORE = re.compile(  # of a calculation, a range or a list
    r"\s*(?:[-+*/×÷·^,]|x(?=\s?\d)|\\times|\\cdot|\\div|(?<=\s)(?:to|and|or)(?=\s))\s*[($]{0,2}"
    r"(?=-?[\d.]*\d)"
)
_EQUALS = re.compile(r"\s*(?:[a-zA-Z%°]+\s*)?=\s*(?=[-+$€£(\\]{0,4}\.?\d)")
_UNKNOWN = re.compile(  # what follows the number of 2x, 2π, 2√3 and 2\sqrt{3}, but not of 2\%
    r"[abijnpqrtxyzπθ√(](?![a-z])|\s*[√π]|\s*\\(?:sqrt|pi|frac|dfrac|ln|log|sin|cos|tan|theta)"
)


def number(text: str) -> Fraction | None:
    r"""The number that a text states, else its last one; None where there is none.

    Exact: 0.5, 1/2, 1 1/2, ½, \frac{1}{2}, 1,234.5 (also 1 234.5, 1.234,5, 1{,}234 and 1'234), 1e3,
    1.5 × 10^3, 3 million; -, − and –, and + are signs. A currency's sign and %, like any unit, are
    not part of it: 50% is 50. Dates, times, powers, roots and 2x are no numbers.

    What is stated decides even where it is none, as a range or a list. Of a sentence it is the
    first number, or what the calculation equals that begins with it.
    """
    stated = stated_answer(text)
    if stated is not None:
        return _stated_number(plain(_WORDS.sub(r" \1 ", stated)))
    values = [_value(match) for match in _NUMBER.finditer(plain(_reply(text)))]
    return next((value for value in reversed(values) if value is not None), None)


def whole_number(text: str) -> Fraction | None:
    """The number that a text consists of, but for dollar signs and white space around it."""
    match = _NUMBER.fullmatch(plain(text).strip("$ \n\t."))
    return _value(match) if match else None


def stated_answer(text: str) -> str | None:
    """The last answer that a text states, None if it states none.

    A sentence whose "answer is" leads to words alone states none; a box with words does.
    """
    text = _reply(text)
    for marker in reversed([*_MARKER.finditer(text)]):
        if marker[0].endswith("{"):
            return _braced(text, marker.end())
        if marker[0].lower() == "<answer>":
            return re.split("</answer>", text[marker.end() :], flags=re.IGNORECASE)[0].strip()
        clause = _CLAUSE.match(text, marker.end())
        assert clause is not None
        if "\\" in clause[0] or any(c.isdigit() for c in plain(clause[0])):
            return clause[0].strip(" \t\r\n:")
    return None


def plain(text: str) -> str:
    """The text with one spelling of minus signs, fractions, powers, currency and separators."""
    text = re.sub("[−‐‑‒–\ufe63\uff0d]", "-", text)
    for spelled, meant in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\!", "")):
        text = text.replace(spelled, meant)
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d{3})", ",", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: f" {unicodedata.normalize('NFKC', m[0])}", text)
    text = re.sub(r"(?<=\d)\s*(?=\\[cdt]?frac)", " ", text)
    text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    return re.sub(r"(=\s*-)\s+(?=[\d.$])", r"\1", text)


def without_separators(text: str) -> str:
    """`plain`, and numbers with separators or exponents as digits and a point: 1e3 as 1000."""

    def digits(match: re.Match[str]) -> str:
        exponent = int(match["e"] or match["times"] or 0)
        if match["whole"] or abs(exponent) > _LARGEST or len(match[0]) > _LONGEST:
            return _digits(match[0])
        return str(Fraction(match["base"]) * Fraction(10) ** exponent)

    return _SEPARATED.sub(digits, plain(text))


def _reply(text: str) -> str:
    before, _, reply = text.rpartition("</think>")
    return reply if reply.strip() else before


def _braced(text: str, start: int) -> str:
    """The text up to the brace that closes one opened just before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return text[start:]


def _value(match: re.Match[str]) -> Fraction | None:
    if match["other"] or len(match[0]) > _LONGEST:
        return None
    exponent = int(match["e"] or match["times"] or match["power"] or 0)
    exponent += _NAMES.get((match["name"] or "").lower(), 0)
    if abs(exponent) > _LARGEST:
        return None
    if match["top"]:
        top, under = Fraction(match["top"]), Fraction(match["under"])
        if not under:
            return None
        value = top / under + (int(match["mixed"]) if match["mixed"] and top < under else 0)
    else:
        value = Fraction(_digits(match["whole"] or "1")) * Fraction(10) ** exponent
    return -value if "-" in (match["sign"] or "") + (match["money"] or "") else value


def _digits(written: str) -> str:
    """Without separators of thousands, with a point: "1.234,5" → "1234.5"."""
    written = re.sub(rf"[{_SPACES}'’]", "", written)
    if written.count(".") > 1 or re.fullmatch(r"\d{1,3}(\.\d{3})+,\d+", written):
        written = written.replace(".", "").replace(",", ".")
    return written.replace(",", "")


def _stated_number(text: str) -> Fraction | None:
    position, calculating = 0, False
    while match := _NUMBER.search(text, position):
        if equals := _EQUALS.match(text, match.end()):
            position, calculating = equals.end(), False
        elif more := _MORE.match(text, match.end()):
            position, calculating = more.end(), True
        else:
            unknown = calculating or _UNKNOWN.match(text, match.end())
            return None if unknown else _value(match)
    return None
