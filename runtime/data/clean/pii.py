"""The step `pii`: e-mail addresses, public IP addresses, phone numbers, IBANs and card numbers become `<EMAIL>` etc.

Each kind has a pattern that is wide, and a function that looks closer. What is told apart from it, and stays: versions,
numbers of sections, dates, ISBNs, order numbers, large figures, addresses of private and documentation networks.
"""

import re
from collections.abc import Callable, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network
from itertools import pairwise
from typing import Final, NamedTuple

from trimaran.runtime.data.document import Counts, Document, Removal

_LETTER = "A-Za-z0-9À-ɏ"
# Chinese and its like write no spaces, so their characters may stand beside a number.
_WORD = rf"{_LETTER}_Ͱ-ӿ"
_EMAIL: Final = re.compile(
    rf"(?<![{_LETTER}._%+-])[{_LETTER}](?:[{_LETTER}._%+'-]{{0,62}}[{_LETTER}_+-])?"
    rf"@(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.)+(?P<end>[A-Za-zÀ-ɏ]{{2,24}})"
    # git@github.com:name/project is the address of a repository, and x@w.view(1) a product of matrices.
    rf"(?![{_LETTER}@(_-]|:[\w~/])"
)
# Names of pictures for fine screens, such as logo@2x.png.
_FILE: Final = ("avif", "css", "gif", "ico", "jpeg", "jpg", "js", "json", "mp4", "pdf", "png", "svg", "webp")

# The patterns of numbers begin with a plain set, which is searched for fast; then they look at the character before.
_IP: Final = re.compile(
    rf"[0-9](?:(?<![{_WORD}.].)\d{{0,2}}(?:\.\d{{1,3}}){{3}}(?![{_WORD}-]|\.\d)"
    # Of IPv6 only 2000::/3 is public; a::b is a name in C++ and Rust.
    rf"|(?<=[23])(?<![{_WORD}.].)(?<![0-9A-Fa-f:]:.)[0-9A-Fa-f]{{3}}(?:::?[0-9A-Fa-f]{{1,4}}){{1,7}}"
    rf"(?![{_WORD}]|:[0-9A-Fa-f:]|\.\d))"
)
_DOCUMENTATION: Final = IPv6Network("3fff::/20")  # RFC 9637, which Python 3.11 does not know
_VERSION: Final = re.compile(
    r"(?:(?:\bv|\bver|version|release|build|firmware|revision|sürüm)[\s:.=#]{0,3}"
    r"|(?:upgrad|updat|bump|patch)\w*\s[^\n]{0,20}\b(?:to|from)\s|\w/|\w-"
    # The end of what is masked compares nothing.
    r"|(?:[=<~^!]|(?<!<EMAIL)(?<!<IBAN)(?<!<CARD)(?<!<IP)(?<!<PHONE)>)=?\s?)\Z",
    re.IGNORECASE,
)
# All parts below 100 has one address of 43, and most versions and numbers of sections.
_SAYS_IP: Final = re.compile(
    r"(?:\b(?:ip|ipv4|addr|host|server|dns|proxy|gateway|router|ping|ssh|adres|sunucu)\w*[^\w\n][^.\n]{0,16}|//|@)\Z",
    re.IGNORECASE,
)
_RESOLVERS: Final = ("1.1.1.1", "8.8.4.4", "8.8.8.8", "9.9.9.9")
_PORT: Final = re.compile(r":\d{2,5}\b|/\d\d?(?![\w.])")

# Country and length, of the registry of ISO 13616 that SWIFT keeps.
_IBAN_LENGTHS: Final = (
    "NO15 BE16 DK18 FI18 FK18 FO18 GL18 NL18 SD18 MK19 SI19 AT20 BA20 EE20 KZ20 LT20 LU20 MN20 XK20 CH21 HR21 "
    "LI21 LV21 BG22 BH22 CR22 DE22 GB22 GE22 IE22 ME22 RS22 VA22 AE23 GI23 IL23 IQ23 OM23 SO23 TL23 AD24 CZ24 "
    "ES24 MD24 PK24 RO24 SA24 SE24 SK24 TN24 VG24 LY25 PT25 ST25 IS26 TR26 BI27 DJ27 FR27 GR27 IT27 MC27 MR27 "
    "SM27 AL28 AZ28 BY28 CY28 DO28 GT28 HN28 HU28 LB28 NI28 PL28 SV28 BR29 EG29 PS29 QA29 UA29 JO30 KW30 MU30 "
    "YE30 MT31 SC31 LC32 RU33 "
)
_IBAN: Final = re.compile(
    r"[A-Z](?<![A-Za-z0-9].)(?=[A-Z]\d\d)(?:"
    + "|".join(
        rf"(?<={code[0]}){code[1]}\d\d(?:[ \xa0-]?[A-Z0-9]){{{int(code[2:]) - 4}}}" for code in _IBAN_LENGTHS.split()
    )
    + ")(?![A-Za-z0-9])"
)

_CARD: Final = re.compile(
    rf"[2-69](?<![{_WORD}/=-].)(?<!\d[.,].)\d{{3}}"
    rf"(?:([ -]?)\d{{4}}\1\d{{4}}\1\d{{4}}|([ -]?)\d{{6}}\2\d{{4,5}}|\d{{13,15}})(?![{_WORD}-]|[.,]\d)"
)
# Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay, Maestro, Mir, Troy.
_ISSUED: Final = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:5[0678]|67)\d{14,17}|220[0-4]\d{12}|9792\d{12}"
)

_BETWEEN = r"(?:[ \xa0./-]|\)[ -]?| ?\()?"
_PHONE: Final = re.compile(
    rf"[+(0-9](?<![{_WORD}+@#%&=/$€£₺^~-].)(?<!\d[.,:].)"
    r"(?:(?<=\+)(?:\((?=\d{1,5}\)))?\d|(?<=\()(?=\d{1,5}\))\d|(?<=\d))"
    rf"(?:{_BETWEEN}\d){{6,16}}+(?![{_WORD}@%/\xb0]|[.,:-]\d)"
)
_LIKE_PHONE: Final = re.compile(r"\d(?:[ \xa0./()-]{0,2}\d){6}")
_DATE: Final = re.compile(r"(?:19|20)\d\d[./-]\d\d?[./-]\d\d?|\d\d?[./-]\d\d?[./-](?:19|20)\d\d")
_AMERICAN: Final = re.compile(
    r"(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]|[2-9]\d\d\.[2-9]\d\d\.|[2-9]\d\d-[2-9]\d\d-)\d{4}"
)
# The first digit of a national number is dialled within the country; two digits and more stand together.
_NATIONAL: Final = re.compile(r"(?:0 \(?\d{3}\)?|\(?0[1-9]\d{0,3}\)?)(?:(?:[ \xa0-]?\d{2,4}){2,4}|(?:\.\d{2,4}){2,4})")
_CALLED: Final = re.compile(
    r"(?:\b(?:tel|t[eé]l[eé]phone?|telefon\w*|tlf|phone|mobile?|cell|cep|gsm|fax|faks|whatsapp|handy)|тел)"
    r"(?:\s?(?:no|number|nr|numaras[ıi]))?[ \t.:]{0,3}(?:\(\w+\)[ \t:]{0,2})?\Z",
    re.IGNORECASE,
)


class _Kind(NamedTuple):
    """How one kind of personal data is found.

    Attributes:
        gate: a pattern that is in every text that has this kind, and is fast.
        pattern: what may be one.
        is_one: whether a match of the pattern is one.
    """

    gate: re.Pattern[str]
    pattern: re.Pattern[str]
    is_one: Callable[[re.Match[str]], bool]


class Pii:
    """Masks personal data.

    Args:
        kinds: names of KINDS.
    """

    name = "pii"

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = [name for name in KINDS if name in kinds]

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None."""
        text, before = document.text, ""
        while text != before:  # what is masked may be what told a neighbour apart from personal data
            before = text
            for name in self._kinds:
                kind = KINDS[name]
                if kind.gate.search(text):
                    text = _masked(text, name, kind, counts)
        if text != document.text:
            counts["pii.documents"] += 1
            document.text = text
        return None


def _masked(text: str, name: str, kind: _Kind, counts: Counts) -> str:
    """Return the text with each match that is one replaced; the same object where there is none."""
    # Again, because of two numbers side by side, which are one match, the second may be found first.
    while found := [match.span() for match in kind.pattern.finditer(text) if kind.is_one(match)]:
        counts[f"pii.{name}"] += len(found)
        counts["pii.characters"] += sum(end - start for start, end in found)
        ends = [0, *(end for _, end in found)]
        starts = [*(start for start, _ in found), len(text)]
        text = f"<{name.upper()}>".join(text[end:start] for end, start in zip(ends, starts, strict=True))
    return text


def _is_email(match: re.Match[str]) -> bool:
    return match["end"].lower() not in _FILE


def _is_public_ip(match: re.Match[str]) -> bool:
    try:
        address = IPv6Address(match[0]) if ":" in match[0] else IPv4Address(match[0])
    except AddressValueError:
        return False
    if not address.is_global or address.is_multicast:
        return False
    return address not in _DOCUMENTATION if isinstance(address, IPv6Address) else not _is_number_of_part(match)


def _is_number_of_part(match: re.Match[str]) -> bool:
    """Whether four numbers are rather a version, or the number of a section, than an address."""
    text, start, end = match.string, match.start(), match.end()
    before = text[max(0, start - 32) : start]
    if _SAYS_IP.search(before) or match[0] in _RESOLVERS or _PORT.match(text, end):
        return False
    return max(map(int, match[0].split("."))) < 100 or _VERSION.search(before) is not None


def is_iban(text: str) -> bool:
    """Whether the remainder of an IBAN by 97 is 1 (ISO 13616); its length is not looked at."""
    plain = re.sub(r"[ \xa0-]", "", text)
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """Whether a number begins and is as long as those of a card issuer, and has Luhn's check digit (ISO/IEC 7812)."""
    digits = re.sub("[ -]", "", text)
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return _ISSUED.fullmatch(digits) is not None and (sum(map(int, digits[::-2])) + sum(doubled)) % 10 == 0


def _is_phone(match: re.Match[str]) -> bool:
    """Whether a run of digits is a phone number.

    It is one with +; as written in North America; with a leading 0 in groups, as in most of Europe; or after a word
    such as `tel`. Other forms can't be told from other numbers.
    """
    number = match[0]
    digits = re.sub(r"\D", "", number)
    if _DATE.search(number) or not 7 <= len(digits) <= 15:
        return False
    if number.startswith("+"):
        if re.search(r"\.\d\Z", number):  # a figure
            return False
        # Codes of one digit are 1 and 7, with ten digits after them; +5 000 000 is an amount.
        short = digits[0] in "17" or re.match(r"\+\d[ \xa0.-]", number) is not None
        return digits[0] != "0" and (digits[0] in "17" and len(digits) == 11 if short else len(digits) >= 8)
    if _AMERICAN.fullmatch(number) or _CALLED.search(match.string[max(0, match.start() - 32) : match.start()]):
        return True
    groups = list(map(int, re.findall(r"\d+", number)))
    steps = {second - first for first, second in pairwise(groups)}
    if len(groups) < 3 or steps in ({0}, {1}):  # 01 02 03 04 05 is counted, and 00 00 00 00 00 a dump of memory
        return False
    if re.match(r"00[1-9]\d", number):
        return len(digits) >= 10
    return len(digits) in (10, 11) and _NATIONAL.fullmatch(number) is not None


KINDS: Final = {
    "email": _Kind(re.compile("@"), _EMAIL, _is_email),
    "iban": _Kind(re.compile(r"[A-Z]{2}\d\d[ \xa0-]?[A-Z0-9]"), _IBAN, lambda match: is_iban(match[0])),
    "card": _Kind(_LIKE_PHONE, _CARD, lambda match: is_card(match[0])),
    "ip": _Kind(re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d|[23][0-9A-Fa-f]{3}:"), _IP, _is_public_ip),
    "phone": _Kind(_LIKE_PHONE, _PHONE, _is_phone),
}
