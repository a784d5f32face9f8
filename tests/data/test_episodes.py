"""ImageClasses, EpisodeSampler, image_folder, resizing: on small made-up data."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metafast.data import Episodes, EpisodeSampler, ImageClasses, image_folder
from metafast.data.floors import pixel_floor
from metafast.data.resize import resize_area
from metafast.data.sampling import open_unit, random_bits, sample_without_replacement, unit


def numbered(classes: int, examples: int, counts: list[int] | None = None) -> ImageClasses:
    """Every image holds its own row number c * examples + m; padding holds NaN."""
    images = torch.arange(classes * examples, dtype=torch.float32).view(classes, examples, 1, 1, 1)
    names = tuple(f"class{c}" for c in range(classes))
    if counts is None:
        return ImageClasses(images, names)
    count = torch.tensor(counts)
    padding = torch.arange(examples) >= count[:, None]
    return ImageClasses(images.masked_fill(padding[..., None, None, None], torch.nan), names, count)


def same(a: Episodes, b: Episodes) -> bool:
    return all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("support", "support_labels", "query", "query_labels")
    )


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_an_episode_holds_distinct_classes_and_distinct_examples(data):
    counts = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=12))
    ways = data.draw(st.integers(1, len(counts)))
    shots = data.draw(st.integers(1, min(counts) - 1))
    queries = data.draw(st.integers(1, min(counts) - shots))
    sampler = EpisodeSampler(
        numbered(len(counts), 9, counts),
        ways=ways,
        shots=shots,
        queries=queries,
        tasks=7,
        seed=data.draw(st.integers()),
    )
    batch = sampler.batch(data.draw(st.integers(0, 2**40)))

    assert batch.support.shape == (7, ways * shots, 1, 1, 1)
    assert batch.query.shape == (7, ways * queries, 1, 1, 1)
    assert batch.num_classes == ways
    for task in range(7):
        support, query = batch.support[task].flatten(), batch.query[task].flatten()
        rows = torch.cat([support, query])
        assert not rows.isnan().any(), "padding was drawn"
        assert len(rows.unique()) == len(rows), "an image was drawn twice"
        support_class, query_class = support.long() // 9, query.long() // 9
        assert len(support_class.unique()) == ways
        # A label names one class, the same in support and query.
        class_of_label = support_class.view(ways, shots)[:, 0]
        assert torch.equal(class_of_label[batch.support_labels[task]], support_class)
        assert torch.equal(class_of_label[batch.query_labels[task]], query_class)


def test_examples_are_ordered_class_by_class():
    batch = EpisodeSampler(numbered(6, 5), ways=3, shots=2, queries=1, tasks=2).batch(0)
    assert batch.support_labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert batch.query_labels.tolist() == [[0, 1, 2]] * 2
    assert batch.support_labels.dtype == batch.query_labels.dtype == torch.int64


def test_a_batch_depends_on_seed_and_step_alone():
    def sampler(seed: int, tasks: int = 8) -> EpisodeSampler:
        return EpisodeSampler(numbered(50, 20), ways=5, shots=1, queries=3, tasks=tasks, seed=seed)

    first, again = sampler(seed=3), sampler(seed=3)
    again.batch(0)
    again.batch(99)
    torch.manual_seed(1)
    assert same(first.batch(17), again.batch(17))
    assert not torch.equal(first.batch(17).support, first.batch(18).support)
    assert not torch.equal(first.batch(17).support, sampler(seed=4).batch(17).support)
    assert torch.equal(first.batch(17).query[:3], sampler(seed=3, tasks=3).batch(17).query)


def test_seeds_and_steps_do_not_share_episodes():
    # seed s, step t + 1 must not repeat seed s + 1, step t: a sum of the two would.
    sampler = [
        EpisodeSampler(numbered(100, 20), ways=5, shots=1, queries=1, tasks=1, seed=s) for s in range(20)
    ]
    drawn = {
        tuple(sampler[seed].batch(step).support.flatten().tolist())
        for seed in range(20)
        for step in range(20)
    }
    assert len(drawn) == 400


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    EpisodeSampler(numbered(5, 5), ways=2, shots=1, queries=1, tasks=1).batch(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("population", "draws"), [(4, 4), (5, 3), (6, 2)])
def test_every_ordered_sample_is_equally_likely(population, draws):
    rows = 120_000
    sample = sample_without_replacement(random_bits(0, 0, (rows, draws), "cpu"), population)
    code = (sample * population ** torch.arange(draws)).sum(-1)
    seen = code.bincount(minlength=population**draws)
    orders = [
        sum(value * population**place for place, value in enumerate(order))
        for order in permutations(range(population), draws)
    ]
    assert seen[orders].sum() == rows, "a value was drawn twice or out of range"
    expected = rows / len(orders)
    chi_square = float(((seen[orders] - expected) ** 2 / expected).sum())
    freedom = len(orders) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_long_chains_of_swaps_resolve():
    # All of a population of 300, drawn in one go: every step links to earlier ones.
    sample = sample_without_replacement(random_bits(1, 2, (20, 300), "cpu"), 300)
    assert torch.equal(sample.sort(-1).values, torch.arange(300).expand(20, -1))


def test_random_bits_are_uniform_and_nonnegative():
    bits = random_bits(seed=-5, step=2**40, shape=(200_000,), device="cpu")
    assert bits.min() >= 0
    ones = (bits[:, None] >> torch.arange(63) & 1).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 200_000**0.5


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
def test_random_bits_are_those_of_splitmix64_for_one_step_or_several(seed: int) -> None:
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = ((x & mask) ^ ((x & mask) >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    steps = [0, 1, 2**40]
    starts = [mix(mix(seed + golden) + (step + 1) * golden) for step in steps]
    expected = torch.tensor([[mix(start + i * golden) >> 1 for i in range(1, 7)] for start in starts])
    assert torch.equal(random_bits(seed, torch.tensor(steps), (2, 3), "cpu"), expected.view(3, 2, 3))
    for step, bits in zip(steps, expected, strict=True):
        assert torch.equal(random_bits(seed, step, (6,), "cpu"), bits)


def test_a_batch_is_the_same_whatever_was_drawn_before_it() -> None:
    """Steps are drawn in blocks, whose length goes by the size of a step."""

    def sampler(tasks: int) -> EpisodeSampler:
        return EpisodeSampler(numbered(6, 9), ways=4, shots=2, queries=3, tasks=tasks, seed=1)

    few, many = sampler(3), sampler(3000)
    for step in (70, 0, 63, 64, 5):
        assert same(few.batch(step), sampler(3).batch(step))
        assert same(few.batch(step), many.batch(step).take(slice(3)))


def test_episodes_know_how_many_classes_they_were_drawn_with() -> None:
    drawn = EpisodeSampler(numbered(6, 9), ways=4, shots=1, queries=1, tasks=2).batch(0)
    assert (
        drawn.classes == drawn.num_classes == drawn.take(slice(1)).num_classes == drawn.to("cpu").classes == 4
    )
    own = Episodes(drawn.support, drawn.support_labels, drawn.query, drawn.query_labels)
    assert own.num_classes == 4
    assert Episodes(*list(vars(own).values())[:4], classes=7).num_classes == 7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ways": 7}, "ways: expected at most 6"),
        ({"ways": 0}, "ways: expected at least 1, got 0"),
        ({"shots": 0}, "shots: expected at least 1"),
        ({"queries": 0}, "queries: expected at least 1"),
        ({"tasks": 0}, "tasks: expected at least 1"),
        ({"shots": 2, "queries": 2}, r"at most 3.*'class1', got 2 \+ 2"),
    ],
)
def test_impossible_episodes_are_refused(sizes, message):
    classes = numbered(6, 5, [5, 3, 5, 4, 5, 5])
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(classes, **{"ways": 2, "shots": 1, "queries": 1, "tasks": 1} | sizes)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        EpisodeSampler(numbered(2, 2), ways=1, shots=1, queries=1, tasks=1).batch(-1)


@pytest.mark.parametrize(
    ("images", "names", "counts", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), ("a", "b"), None, ValueError, r"images: expected \[C, M, ch, H, W\]"),
        (torch.zeros(2, 3, 1, 4, 4).double(), ("a", "b"), None, TypeError, "images: expected float32"),
        (torch.zeros(2, 3, 1, 4, 4), ("a",), None, ValueError, "names: expected 2"),
        (
            torch.zeros(2, 3, 1, 4, 4),
            ("a", "b"),
            torch.tensor([3]),
            ValueError,
            r"counts: expected shape \(2,\)",
        ),
        (
            torch.zeros(2, 3, 1, 4, 4),
            ("a", "b"),
            torch.tensor([3.0, 3.0]),
            TypeError,
            "counts: expected int64",
        ),
        (
            torch.zeros(2, 3, 1, 4, 4),
            ("a", "b"),
            torch.tensor([3, 4]),
            ValueError,
            r"counts: expected values in 0..3",
        ),
    ],
)
def test_malformed_classes_are_refused(images, names, counts, error, message):
    with pytest.raises(error, match=message):
        ImageClasses(images, names, counts)


def test_subset_keeps_order_names_and_counts():
    part = numbered(4, 3, [3, 2, 1, 3]).subset([2, 0])
    assert len(part) == 2
    assert part.names == ("class2", "class0")
    assert part.counts.tolist() == [1, 3]
    assert part.images[:, 0].flatten().tolist() == [6, 0]


def test_rotations_turn_counter_clockwise_into_new_classes():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned = ImageClasses(image.expand(2, 3, 1, 2, 2), ("a", "b"), torch.tensor([3, 2])).rotated()
    assert turned.names == tuple(
        f"{name}/rot{angle}" for name in "ab" for angle in ("000", "090", "180", "270")
    )
    assert turned.counts.tolist() == [3] * 4 + [2] * 4
    assert turned.images[4, 0, 0].tolist() == [[1, 2], [3, 4]]
    assert turned.images[5, 0, 0].tolist() == [[2, 4], [1, 3]]
    assert turned.images[6, 0, 0].tolist() == [[4, 3], [2, 1]]
    assert turned.images[7, 0, 0].tolist() == [[3, 1], [4, 2]]


def test_rotating_oblong_images_is_refused():
    with pytest.raises(ValueError, match="square images, got 2 x 3"):
        ImageClasses(torch.zeros(1, 1, 1, 2, 3), ("a",)).rotated()


def test_resize_weighs_border_pixels_by_the_fraction_inside():
    # Three pixels onto two: each target pixel covers one and a half source pixels.
    row = torch.tensor([[6.0, 3.0, 0.0]])
    torch.testing.assert_close(resize_area(row, 1, 2), torch.tensor([[5.0, 1.0]]))


def test_resize_is_the_block_mean_where_sizes_divide_and_keeps_the_mean_always():
    images = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        resize_area(images, 4, 6), images.unflatten(-1, (6, 2)).unflatten(-3, (4, 3)).mean((-1, -3))
    )
    torch.testing.assert_close(resize_area(images, 7, 5).mean((-1, -2)), images.mean((-1, -2)))
    with torch.autocast("cpu", torch.bfloat16):  # evaluation loads its images there
        assert resize_area(images, 7, 5).dtype == torch.float32


def test_pixel_floor_scores_the_nearest_support_example():
    support = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    query = torch.tensor([[[5.0, 1.0], [0.1, 0.2], [0.1, 0.2], [3.0, 2.9]]])
    episodes = Episodes(support, torch.tensor([[0, 1]]), query, torch.tensor([[0, 1, 1, 1]]))
    assert pixel_floor(episodes) == 0.75  # by angle: 0, 1, 1, 0
    assert pixel_floor(episodes, "euclidean") == 0.5  # by distance: 0, 0, 0, 1
    with pytest.raises(ValueError, match="metric: expected 'cosine' or 'euclidean', got 'dot'"):
        pixel_floor(episodes, "dot")


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, count in (("cat", 2), ("dog", 1)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(count):
            image.new("RGB", (6, 4), (255, 0, 102 * index)).save(folder / f"{index}.png")
        (folder / "notes.txt").write_text("not an image")
    return tmp_path


def test_image_folder_makes_one_class_per_folder(pictures):
    colour = image_folder(pictures, image_size=3)
    assert colour.names == ("cat", "dog")
    assert colour.counts.tolist() == [2, 1]
    assert colour.images.shape == (2, 2, 3, 3, 3)
    torch.testing.assert_close(colour.images[0, 1, :, 2, 0], torch.tensor([1.0, 0.0, 0.4]))
    assert not colour.images[1, 1].any(), "padding must be zero"
    grey = image_folder(str(pictures), image_size=3, grayscale=True)
    assert grey.images.shape == (2, 2, 1, 3, 3)
    assert 0.2 < grey.images[0, 0].mean() < 0.4  # the luminance of red


def test_image_folder_passes_over_hidden_folders_and_what_is_no_image(pictures):
    (pictures / "cat" / "0.png").rename(pictures / "cat" / "0.PNG")
    for folder in (".git", ".ipynb_checkpoints"):
        (pictures / folder).mkdir()
    for file in ("paper.pdf", "film.mpg", "arrays.h5", "._0.png", ".DS_Store", "png"):
        (pictures / "cat" / file).write_bytes(b"not an image")
    taken = image_folder(pictures, image_size=3)
    assert taken.names == ("cat", "dog")
    assert taken.counts.tolist() == [2, 1]


def test_image_folder_says_what_is_absent(pictures, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        image_folder(tmp_path / "nowhere", image_size=3)
    with pytest.raises(ValueError, match="expected one folder per class"):
        image_folder(pictures / "cat", image_size=3)
    with pytest.raises(ValueError, match="image_size: expected at least 1"):
        image_folder(pictures, image_size=0)
    (pictures / "empty").mkdir()
    (pictures / "empty" / "paper.pdf").touch()
    with pytest.raises(ValueError, match=r"expected images in .*empty, found none"):
        image_folder(pictures, image_size=3)


def test_bits_become_numbers_of_the_unit_interval() -> None:
    most = 2**63 - 1
    bits = torch.tensor([0, 1 << 39, most])
    assert unit(bits).tolist() == [0, 2**-24, 1 - 2**-24]
    assert open_unit(bits).tolist() == [2**-24, 2**-24, 1 - 2**-24]
    drawn = random_bits(0, 0, (1000,), "cpu")
    assert unit(drawn).dtype == open_unit(drawn).dtype == torch.float32
    assert torch.equal(open_unit(drawn), ((drawn >> 40).float() + 0.5) * 2**-23)
    assert abs(float(unit(drawn).mean()) - 0.5) < 5 / 12**0.5 / 1000**0.5


def test_pictures_of_16_bits_keep_their_greys(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "ramp").mkdir()
    greys = torch.arange(0, 65536, 257, dtype=torch.int32).view(16, 16)
    image.fromarray(greys.numpy().astype("uint16")).save(tmp_path / "ramp" / "0.png")
    for grayscale in (True, False):
        picture = image_folder(tmp_path, image_size=16, grayscale=grayscale).images[0, 0]
        torch.testing.assert_close(picture, (greys / 65535).expand_as(picture))


class Pictures(torch.utils.data.Dataset):
    """Items of any kind, with targets out of order."""

    def __init__(self, images, targets, classes=None):
        self.images, self.targets = images, targets
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


@pytest.mark.parametrize("kind", ["float tensor", "uint8 tensor", "array", "Pillow"])
def test_a_torch_dataset_becomes_classes(kind):
    pixels = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels_last = [image.movedim(0, -1).numpy() for image in pixels]
    images = {
        "float tensor": pixels / 255,
        "uint8 tensor": pixels,
        "array": channels_last,
        "Pillow": [pytest.importorskip("PIL.Image").fromarray(image) for image in channels_last],
    }[kind]
    classes = ImageClasses.from_dataset(Pictures(images, torch.tensor([7, 2, 7, 2, 7]), list("abcdefgh")))
    assert classes.names == ("c", "h")
    assert classes.counts.tolist() == [2, 3]
    torch.testing.assert_close(classes.images[0, :2], pixels[[1, 3]] / 255)
    torch.testing.assert_close(classes.images[1], pixels[[0, 2, 4]] / 255)
    sizes = {"ways": 2, "shots": 1, "queries": 1, "tasks": 3}
    drawn = EpisodeSampler.from_dataset(Pictures(images, [7, 2, 7, 2, 7]), **sizes).batch(0)
    assert drawn.support.shape == (3, 2, 3, 4, 6)


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        ([], [], ValueError, "dataset: expected examples, got none"),
        (
            [torch.rand(2, 2), torch.rand(3, 2)],
            [0, 0],
            ValueError,
            r"\[1, 2, 2\] as the first, got \[1, 3, 2\] at 1",
        ),
        ([torch.rand(2)], [0], TypeError, r"expected images \[ch, H, W\], got \[2\] at 0"),
        ([torch.rand(2, 2)], [None], TypeError, r"expected pairs \(image, target\), got at 0"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(images, targets, error, message):
    with pytest.raises(error, match=message):
        ImageClasses.from_dataset(Pictures(images, targets))
