"""Draw a small dataset of cars, for the tests and for trying the program with no network.

    python tests/draw_cars.py                      # 8 classes, 640 + 80 photos, in drawn_cars
    python tests/draw_cars.py large --width 608    # as wide as the average photo of Stanford Cars

Each class is a body: its outline, its wheels, its windows and its details. Colour, place, scale,
direction, background, light and noise vary from photo to photo. The folder is laid out as the Hub
repository of Stanford Cars is: README.md with the dataset's card, and data/*.parquet, one a split.
"""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# One body each, seen from the side in a box 100 wide, with the ground at y = 0 and y upwards:
# outline and windows (polygons), x and radius of the wheels, its livery (where and in which
# colour) and what is drawn above the body.
BODIES = {
    "Convertible": dict(
        outline=[(2, 9), (4, 22), (36, 25), (80, 25), (97, 22), (98, 9)],
        windows=[[(34, 25), (28, 38), (31, 38), (38, 25)]],
        wheels=(20, 80),
        radius=9,
        livery=lambda x, y: y % 8 < 4,
        colour=(250, 220, 40),
        # Two seats.
        above=[
            [(46, 24), (46, 33), (52, 33), (52, 24)],
            [(62, 24), (62, 33), (68, 33), (68, 24)],
        ],
    ),
    "Coupe": dict(
        outline=[(1, 8), (3, 20), (30, 24), (48, 36), (62, 36), (92, 24), (99, 21), (98, 8)],
        windows=[[(36, 25), (48, 33), (60, 33), (74, 25)]],
        wheels=(19, 81),
        radius=10,
        livery=lambda x, y: x % 12 < 5,
        colour=(240, 240, 240),
        # A spoiler.
        above=[[(84, 24), (84, 33), (99, 34), (99, 31), (88, 30), (88, 24)]],
    ),
    "Hatchback": dict(
        outline=[(12, 8), (13, 24), (30, 28), (42, 44), (78, 44), (88, 27), (88, 8)],
        windows=[
            [(34, 29), (43, 41), (57, 41), (57, 29)],
            [(60, 29), (60, 41), (75, 41), (81, 29)],
        ],
        wheels=(26, 75),
        radius=9,
        livery=lambda x, y: (x // 6 + y // 6) % 2 < 1,
        colour=(255, 60, 60),
        above=[],
    ),
    "Limousine": dict(
        outline=[(0, 8), (1, 20), (16, 23), (23, 34), (84, 34), (92, 23), (100, 20), (100, 8)],
        windows=[[(x, 24), (x, 32), (x + 8, 32), (x + 8, 24)] for x in range(23, 83, 10)],
        wheels=(13, 88),
        radius=7,
        livery=lambda x, y: x < 0,
        colour=(0, 0, 0),
        above=[],
    ),
    "Pickup": dict(
        outline=[(1, 11), (2, 30), (24, 33), (32, 50), (54, 50), (55, 28), (99, 28), (99, 11)],
        windows=[[(29, 33), (35, 46), (51, 46), (51, 33)]],
        wheels=(20, 79),
        radius=12,
        livery=lambda x, y: (x + y) % 14 < 6,
        colour=(255, 140, 30),
        # Posts on its bed.
        above=[
            [(60, 26), (60, 40), (63, 40), (63, 26)],
            [(92, 26), (92, 40), (95, 40), (95, 26)],
        ],
    ),
    "SUV": dict(
        outline=[(3, 13), (4, 33), (24, 36), (33, 55), (94, 55), (97, 33), (97, 13)],
        windows=[
            [(x, 37), (x + (4 if x == 28 else 0), 51), (x + 19, 51), (x + 19, 37)]
            for x in (28, 50, 72)
        ],
        wheels=(22, 78),
        radius=13,
        livery=lambda x, y: (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 16,
        colour=(60, 230, 90),
        # A roof rack.
        above=[[(36, 54), (36, 60), (90, 60), (90, 54)]],
    ),
    "Sedan": dict(
        outline=[(1, 8), (2, 22), (25, 26), (37, 39), (66, 39), (79, 26), (98, 23), (99, 8)],
        windows=[
            [(30, 26), (39, 36), (50, 36), (50, 26)],
            [(53, 26), (53, 36), (64, 36), (73, 26)],
        ],
        wheels=(21, 80),
        radius=8,
        livery=lambda x, y: y < 17,
        colour=(70, 120, 255),
        above=[],
    ),
    "Van": dict(
        outline=[(2, 8), (3, 28), (17, 62), (97, 62), (98, 8)],
        windows=[[(9, 36), (19, 56), (32, 56), (32, 36)]],
        wheels=(19, 80),
        radius=8,
        livery=lambda x, y: ((x - 66) ** 2 + (y - 36) ** 2) ** 0.5 % 12 < 6,
        colour=(250, 80, 220),
        above=[],
    ),
}

CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{classes}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""


def draw_background(rng: np.random.Generator, width: int, height: int, horizon: int) -> Image.Image:
    """Sky, ground and a few blocks between them, in muted colours."""

    def muted(low: int, high: int) -> tuple[int, ...]:
        return tuple((rng.integers(low, high) + rng.integers(-15, 16, 3)).tolist())

    photo = Image.new("RGB", (width, height), muted(130, 230))
    draw = ImageDraw.Draw(photo)
    for _ in range(rng.integers(2, 7)):
        left, size = rng.integers(0, width), rng.integers(width // 12, width // 3)
        top = horizon - rng.integers(height // 12, height // 2)
        draw.rectangle([left, top, left + size, horizon], fill=muted(60, 220))
    draw.rectangle([0, horizon, width, height], fill=muted(70, 150))
    return photo


def draw_photo(rng: np.random.Generator, name: str, width: int) -> Image.Image:
    """One photo of a car of class `name`, RGB, `width` pixels wide and about two thirds as high."""
    body, height = BODIES[name], int(width * rng.uniform(0.6, 0.75))
    unit = width * rng.uniform(0.7, 0.95) / 100  # pixels per hundredth of the car's length
    left, ground = rng.uniform(0, width - 100 * unit), height * rng.uniform(0.8, 0.95)

    def place(points):
        return [(left + x * unit, ground - y * unit) for x, y in points]

    def box(x, y, radius):
        top_left, bottom_right = place([(x - radius, y + radius), (x + radius, y - radius)])
        return [*top_left, *bottom_right]

    photo = draw_background(rng, width, height, int(ground - rng.uniform(0.05, 0.3) * height))
    draw = ImageDraw.Draw(photo)
    paint = tuple(int(c) for c in rng.integers(20, 200, 3))
    shade = tuple(c // 2 for c in paint)
    shadow = [(0, 0), (4, 3), (96, 3), (100, 0), (96, -3), (4, -3)]
    draw.polygon(place(shadow), fill=(35, 35, 35))
    for part in body["above"]:
        draw.polygon(place(part), fill=shade)
    draw.polygon(place(body["outline"]), fill=paint, outline=shade)
    inside = Image.new("1", photo.size)
    ImageDraw.Draw(inside).polygon(place(body["outline"]), fill=1)
    rows, columns = np.mgrid[:height, :width]
    livery = body["livery"]((columns - left) / unit, (ground - rows) / unit) & np.asarray(inside)
    photo.paste(body["colour"], mask=Image.fromarray(livery))
    for window in body["windows"]:
        draw.polygon(place(window), fill=(40, 55, 75), outline=(15, 15, 20))
    for x in body["wheels"]:
        draw.ellipse(box(x, body["radius"], body["radius"]), fill=(20, 20, 20))
        draw.ellipse(box(x, body["radius"], body["radius"] / 2), fill=(190, 190, 195))
    ends = [x for x, _ in body["outline"]]
    draw.ellipse(box(min(ends) + 4, 17, 2.5), fill=(255, 245, 190))  # headlight
    draw.rectangle(box(max(ends) - 4, 17, 2), fill=(190, 20, 20))  # tail light
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0, unit / 3)))
    light = rng.uniform(0.7, 1.15)
    noise = rng.normal(0, rng.uniform(2, 8), (height, width, 3))
    pixels = np.asarray(photo) * light + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_split(
    names: list[str], per_class: int, width: int, rng: np.random.Generator
) -> datasets.Dataset:
    """`per_class` JPEG photos of each class, shuffled, with the columns `image` and `label`."""
    photos = []
    labels = rng.permutation(np.repeat(np.arange(len(names)), per_class)).tolist()
    for label in labels:
        photo = draw_photo(rng, names[label], int(width * rng.uniform(0.8, 1.2)))
        jpeg = io.BytesIO()
        photo.save(jpeg, "JPEG", quality=90)
        photos.append({"bytes": jpeg.getvalue(), "path": None})
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": photos, "label": labels}, features=features)


def draw_cars(
    folder: Path,
    train_per_class: int = 80,
    test_per_class: int = 10,
    width: int = 160,
    seed: int = 0,
):
    """Write the dataset to `folder`; the same arguments give the same photos."""
    datasets.disable_progress_bars()
    names = sorted(BODIES)
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, per_class in (("train", train_per_class), ("test", test_per_class)):
        photos = draw_split(names, per_class, width, rng)
        photos.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    classes = "\n".join(f"          '{label}': {name}" for label, name in enumerate(names))
    (folder / "README.md").write_text(CARD.format(classes=classes))


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=Path("drawn_cars"), help="(%(default)s)")
    add("--train", type=int, default=80, help="train photos of each class (%(default)s)")
    add("--test", type=int, default=10, help="test photos of each class (%(default)s)")
    add("--width", type=int, default=160, help="mean width in pixels (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random draws (%(default)s)")
    args = parser.parse_args()
    draw_cars(args.folder, args.train, args.test, args.width, args.seed)
    counts = f"{args.train} train and {args.test} test photos of each"
    print(f"{args.folder}: {len(BODIES)} classes, {counts}")
