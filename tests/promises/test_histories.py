"""R8: any history of batches and commands leaves database and reference with the same balances, holds and grants."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from tests.credits.histories import Connection, Stage, Step, random_steps, shrunk
from tests.promises.figures import SEED, figure, tell

from bursar import db

Theater = tuple[Connection, Connection]

SHARDS = 4
MOST_DIFFERENCES = 3  # of a shard, each of which takes a minute to shorten

# Histories that once failed, as the shrinker printed them.
REGRESSIONS: dict[str, list[Step]] = {
    # What came back made a grant active again that had ended, and nobody awaited its end.
    "an end that comes again": [
        ("pool", 0, 0, 1, 0, 0),
        ("pool", 0, 1, 0, 0, 0),
        ("grant", 0, 1, 1, 50, 0, 0, 0, 0),
        ("allocate", 0, 1, 0, 1, 1, 2, 1, 1),
        ("grant", 1, 439, 676, 400, 686, 836, 219, 44),
        ("grant", 1, 602, 575, 200, 421, 443, 445, 990),
        (
            "batch",
            1,
            (
                (884, 419, 104, 255, 801, 459, 459, 224, 662, 132),
                (335, 157, 535, 41, 589, 608, 123, 813, 722, 536),
                (746, 328, 221, 653, 928, 871, 258, 696, 680, 155),
                (499, 960, 434, 253, 653, 747, 341, 459, 604, 172),
            ),
        ),
        (
            "batch",
            2,
            (
                (450, 959, 907, 575, 527, 960, 560, 876, 588, 89),
                (642, 741, 980, 476, 813, 922, 276, 634, 191, 346),
                (28, 373, 906, 604, 70, 32, 602, 788, 678, 801),
                (637, 840, 645, 320, 591, 533, 678, 335, 318, 918),
            ),
        ),
        ("end_allocation", 8, 312, 924, 134, 736),
        ("expire", 10, 296, 737, 816, 873),
        (
            "batch",
            3,
            (
                (43, 175, 395, 333, 880, 647, 35, 28, 129, 75),
                (920, 53, 983, 475, 884, 268, 37, 822, 944, 676),
                (746, 722, 403, 347, 859, 825, 87, 904, 635, 14),
                (777, 245, 349, 222, 371, 903, 143, 998, 212, 561),
                (924, 113, 307, 419, 963, 325, 322, 913, 993, 742),
                (404, 926, 110, 671, 937, 820, 792, 909, 849, 743),
                (48, 747, 729, 892, 24, 543, 443, 307, 289, 18),
                (658, 785, 266, 329, 598, 178, 796, 997, 993, 248),
                (549, 963, 199, 194, 436, 212, 411, 838, 25, 526),
                (528, 844, 602, 417, 601, 885, 374, 87, 891, 110),
                (944, 65, 612, 1, 31, 569, 893, 53, 875, 872),
            ),
        ),
        (
            "batch",
            0,
            (
                (832, 745, 187, 411, 895, 758, 863, 495, 611, 445),
                (767, 728, 435, 898, 744, 712, 74, 493, 275, 274),
                (688, 556, 53, 99, 221, 567, 104, 900, 346, 56),
                (194, 550, 816, 700, 941, 991, 539, 674, 175, 312),
                (756, 44, 991, 331, 900, 1, 800, 481, 533, 582),
                (18, 84, 605, 740, 859, 342, 3, 101, 155, 576),
                (236, 555, 684, 719, 965, 522, 239, 3, 862, 810),
                (357, 974, 815, 233, 2, 203, 20, 779, 178, 413),
                (850, 550, 712, 346, 348, 220, 809, 297, 636, 595),
                (818, 756, 382, 769, 366, 118, 518, 472, 767, 209),
                (995, 690, 611, 917, 50, 873, 306, 470, 252, 889),
                (361, 744, 661, 282, 135, 733, 414, 492, 206, 292),
                (541, 718, 34, 640, 509, 298, 5, 0, 749, 385),
                (368, 658, 187, 856, 157, 341, 673, 501, 78, 920),
                (322, 225, 203, 447, 338, 707, 115, 117, 324, 730),
                (682, 828, 353, 46, 98, 908, 999, 146, 935, 174),
                (35, 80, 307, 655, 671, 366, 359, 508, 24, 754),
                (730, 356, 955, 191, 674, 128, 346, 905, 994, 781),
                (357, 663, 565, 161, 223, 330, 833, 85, 503, 299),
                (616, 6, 587, 434, 381, 966, 933, 421, 941, 285),
                (898, 101, 159, 786, 172, 769, 13, 913, 109, 172),
                (288, 432, 652, 737, 583, 709, 552, 957, 657, 602),
                (774, 712, 419, 213, 1, 7, 776, 374, 24, 964),
                (409, 409, 805, 655, 248, 991, 518, 267, 517, 918),
                (453, 71, 234, 630, 479, 206, 849, 631, 823, 371),
                (607, 344, 284, 124, 315, 653, 151, 322, 946, 620),
                (910, 778, 129, 431, 593, 701, 589, 260, 924, 400),
                (980, 851, 265, 753, 858, 879, 63, 127, 412, 260),
                (967, 363, 621, 352, 254, 339, 821, 963, 818, 163),
            ),
        ),
        ("person", 5, 735, 183, 21),
        ("batch", 4, ((370, 711, 453, 236, 974, 848, 307, 921, 955, 470),)),
        ("touch", 9, 222, 649, 124, 836),
        ("touch", 9, 140, 544, 691, 749),
        (
            "batch",
            2,
            (
                (106, 816, 428, 672, 289, 603, 260, 347, 980, 378),
                (527, 977, 0, 748, 789, 686, 830, 129, 323, 403),
                (186, 874, 536, 122, 6, 20, 831, 604, 987, 54),
                (107, 611, 784, 232, 573, 428, 946, 607, 558, 395),
            ),
        ),
        (
            "batch",
            8,
            ((869, 649, 546, 658, 754, 27, 275, 225, 345, 384), (182, 107, 934, 770, 357, 625, 703, 819, 720, 30)),
        ),
    ],
    # What a hold had left in a pool that had closed went on before its batch had written what it used.
    "a closed pool in the middle of a batch": [
        ("pool", 0, 1, 0, 0, 0),
        ("grant", 0, 1, 0, 200, 0, 0, 0, 0),
        (
            "batch",
            2,
            (
                (691, 123, 189, 104, 452, 622, 543, 393, 774, 38),
                (311, 799, 886, 183, 694, 757, 821, 232, 246, 109),
                (904, 633, 136, 639, 760, 793, 373, 517, 464, 241),
            ),
        ),
        ("expire", 7, 952, 327, 411, 581),
        (
            "batch",
            3,
            ((390, 341, 133, 706, 48, 405, 745, 609, 43, 628), (88, 756, 500, 109, 933, 658, 972, 327, 643, 91)),
        ),
        ("batch", 6, ((161, 781, 311, 571, 924, 414, 912, 297, 399, 290),)),
        ("switch", 4, 699, 748, 519, 732),
        ("batch", 1, ((345, 599, 125, 317, 882, 675, 296, 181, 450, 701),)),
    ],
    # A chain of one organization was built because another's was stale.
    "a stale chain elsewhere": [
        ("pool", 1, 897, 434, 665, 874),
        ("limit", 0, 527, 568, 509, 785, 969, 661, 256),
        ("batch", 1, ((882, 173, 511, 748, 24, 326, 406, 84, 609, 255),)),
        (
            "batch",
            2,
            (
                (281, 664, 903, 703, 289, 837, 944, 958, 413, 188),
                (953, 769, 913, 17, 722, 594, 543, 166, 4, 638),
            ),
        ),
    ],
    # A settle by expiry and the settle of the same request met in one batch at one instant.
    "two bookings at one instant": [
        ("pool", 0, 0, 0, 0, 0),
        ("grant", 0, 0, 0, 100, 0, 0, 0, 0),
        (
            "batch",
            5,
            ((993, 305, 238, 97, 74, 724, 542, 688, 816, 218), (911, 503, 266, 318, 588, 405, 501, 368, 460, 935)),
        ),
        ("expire", 9, 0, 0, 0, 0),
        (
            "batch",
            9,
            ((403, 471, 443, 720, 227, 498, 632, 517, 939, 433), (420, 561, 486, 14, 548, 87, 675, 803, 525, 913)),
        ),
    ],
}


@contextmanager
def _theater(books: db.Database) -> Iterator[Theater]:
    """Connections of the simulator and of an admin; kept for many histories, whose plans they remember."""
    with (
        psycopg.connect(books.dsn("bursar_simulator"), autocommit=True) as simulator,
        psycopg.connect(books.dsn("admin"), autocommit=True) as admin,
    ):
        yield simulator, admin


def _play(theater: Theater, steps: list[Step], *, look_every: int | None = None) -> str | None:
    """What differs, if anything. Grants, charges and the like are looked at every so many steps, and in the end."""
    try:
        Stage(*theater).play(steps, look_every=look_every or max(8, len(steps) // 10))
    except (AssertionError, psycopg.Error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _difference(theater: Theater, steps: list[Step], label: str) -> str | None:
    """What differs, and the shortest list of steps found in which anything does; None: nothing differs."""
    what = _play(theater, steps)
    if what is None:
        return None
    short = shrunk(lambda fewer: _play(theater, fewer, look_every=1) is not None, steps, seconds=60)
    return f"{label}: {what}\n\nshortest found:\n{_program(short)}\n\n{_play(theater, short, look_every=1)}"


def _program(steps: list[Any]) -> str:
    return "[\n" + "".join(f"    {step!r},\n" for step in steps) + "]"


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_history_ends_as_the_reference_says(books: db.Database, shard: int) -> None:
    """A long run goes on after a difference, up to a few of them."""
    histories, steps = figure("histories"), figure("steps of a history")
    differences = []
    with _theater(books) as theater:
        for n in range(shard, histories, SHARDS):
            found = _difference(theater, random_steps(SEED + n, steps), f"BURSAR_TEST_SEED={SEED + n}")
            if found is not None:
                print(found, flush=True)
                differences.append(found)
            if len(differences) == MOST_DIFFERENCES:
                break
    tell(f"{len(range(shard, n + 1, SHARDS))} histories of {steps} steps, {len(differences)} differences")
    assert not differences, "\n\n".join(differences)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_history_that_once_failed_does_not_fail_again(books: db.Database, name: str) -> None:
    with _theater(books) as theater:
        assert _difference(theater, REGRESSIONS[name], name) is None
