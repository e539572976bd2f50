"""Unicode's composed form (NFC) as ONNX operators, because onnxruntime-extensions' tokenizers skip that step.

Algorithm: https://www.unicode.org/reports/tr15/ (decompose, sort the marks behind each starter, compose). The tables are read
from Hugging Face `tokenizers`, so they are of the very Unicode version that the checkpoint's tokenizer works with.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

import numpy as np
import onnx.parser
from numpy.typing import NDArray
from tokenizers import normalizers

PAGE = 256
WIDEST = 4
"""Code points that one code point decomposes into, at most."""
RADIX = sys.maxunicode + 1

GRAPH = """
nfc (int64[n] bytes) => (int64[m] composed_bytes)
{
    single = Less (bytes, k128)
    lead = GreaterOrEqual (bytes, k192)
    first = Or (single, lead)
    first_at = NonZero (first)
    at = Reshape (first_at, flat)
    padded = Concat <axis = 0> (bytes, k000)
    at1 = Add (at, k1)
    at2 = Add (at, k2)
    at3 = Add (at, k3)
    b0 = Gather (padded, at)
    b1 = Gather (padded, at1)
    b2 = Gather (padded, at2)
    b3 = Gather (padded, at3)
    b0_shifted = Mul (b0, k64)
    two_raw = Add (b0_shifted, b1)
    two = Sub (two_raw, lead2)
    two_shifted = Mul (two_raw, k64)
    three_raw = Add (two_shifted, b2)
    three = Sub (three_raw, lead3)
    three_shifted = Mul (three_raw, k64)
    four_raw = Add (three_shifted, b3)
    four = Sub (four_raw, lead4)
    below2 = Less (b0, k128)
    below3 = Less (b0, k224)
    below4 = Less (b0, k240)
    long = Where (below4, three, four)
    longer = Where (below3, two, long)
    given = Where (below2, b0, longer)

    given_page = Div (given, k256)
    given_start = Gather (page_starts, given_page)
    given_offset = Mod (given, k256)
    given_kind = Add (given_start, given_offset)
    given_row = Gather (row_of, given_kind)
    given_suspect = Gather (suspect, given_row)
    suspects = ReduceSum <keepdims = 0> (given_suspect)
    must = Greater (suspects, k0)
    composed_bytes = If (must) <
        then_branch = normalize () => (int64[m] encoded)
        {
            parts = Gather (decomposition, given_row)
            given_column = Unsqueeze (given, k1)
            is_itself = Equal (parts, itself)
            all_parts = Where (is_itself, given_column, parts)
            flat_parts = Reshape (all_parts, flat)
            part_there = GreaterOrEqual (flat_parts, k0)
            unsorted = Compress (flat_parts, part_there)
            part_page = Div (unsorted, k256)
            part_start = Gather (page_starts, part_page)
            part_offset = Mod (unsorted, k256)
            part_kind = Add (part_start, part_offset)
            unsorted_row = Gather (row_of, part_kind)
            unsorted_class = Gather (combining, unsorted_row)

            is_starter = Equal (unsorted_class, k0)
            starter = Cast <to = 7> (is_starter)
            run = CumSum (starter, k0)
            length = Size (unsorted)
            length_1 = Reshape (length, flat)
            number = Range (k0, length, k1s)
            run_256 = Mul (run, k256)
            run_class = Add (run_256, unsorted_class)
            spread = Mul (run_class, length)
            key = Add (spread, number)
            sorted_key, order = TopK <axis = 0, largest = 0, sorted = 1> (key, length_1)
            points = Gather (unsorted, order)
            class = Gather (unsorted_class, order)

            always = Cast <to = 9> (k1s)
            final, last_place, last_class = Loop (length, always, points, nothing, nothing) <
                body = compose (int64 i, bool on, int64[l] so_far, int64[1] place, int64[1] before)
                    => (bool go_on, int64[l] next_so_far, int64[1] next_place, int64[1] next_before)
                {
                    go_on = Identity (on)
                    i_1 = Reshape (i, flat)
                    point = Gather (points, i_1)
                    mark = Gather (class, i_1)
                    real_place = Max (place, k0)
                    base = Gather (so_far, real_place)
                    base_shifted = Mul (base, radix)
                    pair = Add (base_shifted, point)
                    is_pair = Equal (pairs, pair)
                    pair_number = Cast <to = 7> (is_pair)
                    found = Mul (pair_number, composites)
                    listed = ReduceSum (found)

                    l_number = Sub (base, l_first)
                    v_number = Sub (point, v_first)
                    l_from = GreaterOrEqual (l_number, k0)
                    l_to = Less (l_number, l_count)
                    v_from = GreaterOrEqual (v_number, k0)
                    v_to = Less (v_number, v_count)
                    is_l = And (l_from, l_to)
                    is_v = And (v_from, v_to)
                    is_lv = And (is_l, is_v)
                    l_rows = Mul (l_number, v_count)
                    lv_number = Add (l_rows, v_number)
                    lv_shifted = Mul (lv_number, t_count)
                    lv = Add (lv_shifted, s_first)

                    s_number = Sub (base, s_first)
                    t_number = Sub (point, t_base)
                    s_from = GreaterOrEqual (s_number, k0)
                    s_to = Less (s_number, s_count)
                    s_rest = Mod (s_number, t_count)
                    s_open = Equal (s_rest, k0)
                    t_from = Greater (t_number, k0)
                    t_to = Less (t_number, t_count)
                    s_in = And (s_from, s_to)
                    s_fits = And (s_in, s_open)
                    t_fits = And (t_from, t_to)
                    is_lvt = And (s_fits, t_fits)
                    lvt = Add (base, t_number)

                    hangul = Where (is_lvt, lvt, listed)
                    composite = Where (is_lv, lv, hangul)
                    is_composite = Greater (composite, k0)
                    has_base = GreaterOrEqual (place, k0)
                    not_blocked = Less (before, mark)
                    reachable = And (has_base, not_blocked)
                    joins = And (is_composite, reachable)

                    base_now = Where (joins, composite, base)
                    with_base = ScatterElements (so_far, real_place, base_now)
                    point_now = Where (joins, nothing, point)
                    next_so_far = ScatterElements (with_base, i_1, point_now)
                    starts = Equal (mark, k0)
                    place_if_kept = Where (starts, i_1, place)
                    next_place = Where (joins, place, place_if_kept)
                    before_if_kept = Where (starts, nothing, mark)
                    next_before = Where (joins, before, before_if_kept)
                }
            >
            final_there = GreaterOrEqual (final, k0)
            kept = Compress (final, final_there)

            high6 = Div (kept, k64)
            high12 = Div (kept, k4096)
            high18 = Div (kept, k262144)
            low0 = Mod (kept, k64)
            low6 = Mod (high6, k64)
            low12 = Mod (high12, k64)
            tail0 = Add (low0, k128)
            tail6 = Add (low6, k128)
            tail12 = Add (low12, k128)
            head2 = Add (high6, k192)
            head3 = Add (high12, k224)
            head4 = Add (high18, k240)
            takes1 = Less (kept, k128)
            takes2 = Less (kept, k2048)
            takes3 = Less (kept, k65536)
            e0_34 = Where (takes3, head3, head4)
            e0_234 = Where (takes2, head2, e0_34)
            e0 = Where (takes1, kept, e0_234)
            e1_34 = Where (takes3, tail6, tail12)
            e1_234 = Where (takes2, tail0, e1_34)
            e1 = Where (takes1, nothing, e1_234)
            e2_34 = Where (takes3, tail0, tail6)
            e2 = Where (takes2, nothing, e2_34)
            e3 = Where (takes3, nothing, tail0)
            c0 = Unsqueeze (e0, k1)
            c1 = Unsqueeze (e1, k1)
            c2 = Unsqueeze (e2, k1)
            c3 = Unsqueeze (e3, k1)
            table = Concat <axis = 1> (c0, c1, c2, c3)
            flat_table = Reshape (table, flat)
            byte_there = GreaterOrEqual (flat_table, k0)
            encoded = Compress (flat_table, byte_there)
        },
        else_branch = keep () => (int64[m] unchanged)
        {
            unchanged = Identity (bytes)
        }
    >
}
"""

_HANGUL = {"l_first": 0x1100, "l_count": 19, "v_first": 0x1161, "v_count": 21, "t_base": 0x11A7, "t_count": 28}
_HANGUL |= {"s_first": 0xAC00, "s_count": 19 * 21 * 28}
"""https://www.unicode.org/versions/latest/core-spec/chapter-3/#G24646"""
_JAMO_BEHIND = frozenset(range(0x1161, 0x1176)) | frozenset(range(0x11A8, 0x11C3))
_ITSELF, _NOTHING = -2, -1


def nfc_graph() -> onnx.GraphProto:
    """UTF-8 bytes `bytes` [n] to those of the composed text, `composed_bytes` [m]; tables included."""
    graph: onnx.GraphProto = onnx.parser.parse_graph(GRAPH)
    constants = {f"k{value}": value for value in (64, 128, 192, 224, 240, 256, 2048, 4096, 65536, 262144)}
    leads = {"lead2": 192 << 6, "lead3": 224 << 12, "lead4": 240 << 18}
    for width in (2, 3, 4):  # the continuation bytes' upper bits, each 128, are taken off with the lead's
        leads[f"lead{width}"] += sum(128 << 6 * i for i in range(width - 1))
    numbers = {**constants, **leads, **_HANGUL, "k0": 0, "k1s": 1, "radix": RADIX, "itself": _ITSELF}
    values = {name: np.int64(value) for name, value in numbers.items()} | _tables()
    values |= {"k1": np.array([1]), "k2": np.array([2]), "k3": np.array([3]), "k000": np.zeros(3, np.int64)}
    values |= {"flat": np.array([-1]), "nothing": np.array([_NOTHING])}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    return graph


@cache
def _tables() -> dict[str, NDArray[np.int64]]:
    """What Unicode says about each code point that normalization can touch; row 0 is for all others."""
    decompose, compose = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    rows: dict[int, tuple[int, list[int], bool]] = {}  # class, parts, whether a text with it may not be composed
    pairs: dict[int, int] = {}
    seconds = set(_JAMO_BEHIND)
    for point in range(RADIX):
        character = chr(point)
        if 0xD800 <= point < 0xE000 or _HANGUL["s_first"] <= point < _HANGUL["s_first"] + _HANGUL["s_count"]:
            continue
        taken_apart = decompose(character)
        mark = _combining_class(character)
        if taken_apart != character:
            stays = compose(character) == character
            rows[point] = mark, [ord(part) for part in taken_apart], not stays
            base = compose(taken_apart[:-1])
            if stays and len(base) == 1:
                pairs[ord(base) * RADIX + ord(taken_apart[-1])] = point
                seconds.add(ord(taken_apart[-1]))
        elif mark:
            rows[point] = mark, [_ITSELF], True
    for point in seconds:
        mark, parts, _ = rows.get(point, (0, [_ITSELF], True))
        rows[point] = mark, parts, True
    row_of = np.zeros(RADIX, np.int64)
    row_of[sorted(rows)] = range(1, len(rows) + 1)
    pages, page_of = np.unique(row_of.reshape(-1, PAGE), axis=0, return_inverse=True)
    ordered = [(0, [_ITSELF], False), *(rows[point] for point in sorted(rows))]
    return {
        "row_of": pages.reshape(-1),
        "page_starts": page_of.reshape(-1) * PAGE,
        "combining": np.array([mark for mark, _, _ in ordered]),
        "decomposition": np.array([parts + [_NOTHING] * (WIDEST - len(parts)) for _, parts, _ in ordered]),
        "suspect": np.array([int(touched) for _, _, touched in ordered]),
        "pairs": np.array(list(pairs)),
        "composites": np.array(list(pairs.values())),
    }


def _combining_class(character: str) -> int:
    """Python's Unicode may be newer than the tokenizer's, to which a later mark is no mark: it is not sorted behind others."""
    mark = unicodedata.combining(character)
    lowest, highest = "\N{COMBINING TILDE OVERLAY}", "\N{COMBINING GREEK YPOGEGRAMMENI}"
    unsorted = f"{character}{lowest}", f"{highest}{character}"
    known = mark and any(normalizers.NFD().normalize_str(text) != text for text in unsorted)
    return mark if known else 0
