"""The words that the built-in world's shop is made of: departments, styles, brands and the sentences of descriptions and bios.

Only data. Each subtype says: nouns, materials, sizes or variants. `world_text.py` puts them together.
"""

from __future__ import annotations

from typing import Final

DEPARTMENTS: Final[dict[str, dict[str, tuple[str, str, str]]]] = {
    "Kitchen": {
        "Cookware": (
            "skillet, saucepan, casserole, wok",
            "cast-iron, stainless-steel, copper, enamelled",
            "20 cm, 24 cm, 26 cm, 28 cm",
        ),
        "Tableware": (
            "dinner plate, cereal bowl, serving platter, mug",
            "stoneware, porcelain, glass, bamboo",
            "set of 2, set of 4, set of 6, single",
        ),
        "Kitchen knives": (
            "chef's knife, bread knife, paring knife, cleaver",
            "carbon-steel, ceramic, Damascus, forged",
            "10 cm, 16 cm, 20 cm, 24 cm",
        ),
        "Coffee and tea": (
            "coffee dripper, teapot, espresso cup, hand grinder",
            "glass, steel, ceramic, cast-iron",
            "300 ml, 500 ml, 1 litre, for one",
        ),
    },
    "Outdoors": {
        "Tents": (
            "tent, tarp, bivouac, awning",
            "ripstop, canvas, silnylon, recycled-nylon",
            "for one, for two, for three, for the family",
        ),
        "Backpacks": (
            "daypack, trekking backpack, hip bag, dry bag",
            "waxed-canvas, nylon, recycled, leather-trimmed",
            "12 litres, 25 litres, 40 litres, 65 litres",
        ),
        "Camp cooking": (
            "camp stove, billy can, fire grate, water filter",
            "titanium, steel, aluminium, enamel",
            "solo, compact, duo, group size",
        ),
        "Climbing": (
            "climbing rope, harness, chalk bag, carabiner set",
            "dynamic, webbing, alloy, padded",
            "30 m, 60 m, small, large",
        ),
    },
    "Garden": {
        "Pots and planters": (
            "planter, window box, hanging pot, herb trough",
            "terracotta, zinc, fibre-clay, oak",
            "15 cm, 25 cm, 40 cm, 60 cm",
        ),
        "Garden tools": (
            "hand trowel, secateurs, garden fork, watering can",
            "ash-handled, steel, galvanised, forged",
            "short, long, junior, full size",
        ),
        "Seeds and bulbs": (
            "wildflower mix, tomato seeds, tulip bulbs, herb seeds",
            "organic, heirloom, hardy, early",
            "1 packet, 3 packets, 20 pieces, 50 pieces",
        ),
        "Garden furniture": (
            "bench, bistro table, deck chair, parasol",
            "teak, iron, aluminium, acacia",
            "for one, for two, folding, extra wide",
        ),
    },
    "Music": {
        "Guitars": (
            "acoustic guitar, ukulele, travel guitar, bass guitar",
            "spruce, mahogany, maple, rosewood",
            "half size, full size, left-handed, cutaway",
        ),
        "Keyboards": (
            "stage piano, synthesizer, MIDI keyboard, melodica",
            "weighted, analogue, portable, touch-sensitive",
            "25 keys, 49 keys, 61 keys, 88 keys",
        ),
        "Percussion": (
            "cajon, djembe, snare drum, shaker set",
            "birch, goatskin, brass, walnut",
            "10 inch, 12 inch, 14 inch, travel size",
        ),
        "Turntables": (
            "turntable, record player, phono amplifier, vinyl crate",
            "walnut-veneer, belt-drive, acrylic, aluminium",
            "manual, automatic, with speakers, compact",
        ),
    },
    "Fitness": {
        "Yoga": (
            "yoga mat, bolster, yoga block, strap",
            "cork, natural-rubber, cotton, recycled-foam",
            "3 mm, 5 mm, 8 mm, extra long",
        ),
        "Strength": (
            "kettlebell, dumbbell pair, resistance band, weight vest",
            "cast-iron, neoprene, latex, rubber-coated",
            "4 kg, 8 kg, 12 kg, 20 kg",
        ),
        "Running": (
            "running belt, headlamp, hydration vest, reflective sash",
            "mesh, stretch, breathable, featherlight",
            "small, medium, large, one size",
        ),
        "Cycling": (
            "bike light set, frame bag, cycling gloves, repair kit",
            "alloy, waterproof, gel-padded, compact",
            "urban, road, gravel, touring",
        ),
    },
    "Stationery": {
        "Notebooks": (
            "notebook, sketchbook, planner, travel journal",
            "linen-bound, leather, recycled-paper, dotted",
            "A4, A5, A6, pocket size",
        ),
        "Pens": (
            "fountain pen, rollerball, brush pen, mechanical pencil",
            "brass, resin, walnut, aluminium",
            "fine, medium, broad, calligraphy",
        ),
        "Desk organisers": (
            "desk tray, pen holder, letter rack, cable box",
            "oak, felt, steel, acrylic",
            "two tiers, three tiers, small, wide",
        ),
        "Greeting cards": (
            "birthday card, thank-you card, postcard set, gift wrap",
            "letterpress, seed-paper, foil-printed, kraft",
            "single, set of 5, set of 10, assorted",
        ),
    },
    "Toys": {
        "Building sets": (
            "building set, marble run, magnetic tiles, train track",
            "beech, cardboard, magnetic, bright-plastic",
            "40 pieces, 100 pieces, 250 pieces, starter",
        ),
        "Board games": (
            "strategy game, memory game, dice game, co-operative game",
            "illustrated, travel, deluxe, pocket",
            "for two, 2-4 players, 3-6 players, family",
        ),
        "Soft toys": (
            "bear, rabbit, dinosaur, octopus",
            "plush, organic-cotton, corduroy, knitted",
            "small, medium, giant, with rattle",
        ),
        "Puzzles": (
            "jigsaw, brain teaser, floor puzzle, wooden cube",
            "cardboard, birch, laser-cut, panoramic",
            "48 pieces, 300 pieces, 500 pieces, 1000 pieces",
        ),
    },
    "Bedroom": {
        "Bed linen": (
            "duvet cover, pillowcase pair, fitted sheet, bed set",
            "linen, percale, bamboo, flannel",
            "single, double, king, cot size",
        ),
        "Blankets": (
            "throw, blanket, quilt, weighted blanket",
            "merino, mohair, fleece, patchwork",
            "100 x 150 cm, 130 x 180 cm, 150 x 200 cm, baby size",
        ),
        "Bedside lamps": (
            "bedside lamp, reading light, night light, salt lamp",
            "brass, paper, glass, smoked-oak",
            "dimmable, clip-on, rechargeable, with timer",
        ),
        "Alarm clocks": (
            "alarm clock, sunrise clock, travel clock, projection clock",
            "wooden, metal, glass, fabric-covered",
            "silent, with radio, twin bell, mini",
        ),
    },
    "Fashion": {
        "Scarves": ("scarf, shawl, snood, bandana", "cashmere, silk, lambswool, linen", "narrow, square, oversized, fringed"),
        "Bags": (
            "tote bag, crossbody bag, weekender, wallet",
            "leather, canvas, cork, vegan-leather",
            "small, medium, large, with zip",
        ),
        "Watches": (
            "wristwatch, diver's watch, chronograph, pocket watch",
            "steel, titanium, leather-strap, mesh-strap",
            "34 mm, 38 mm, 42 mm, automatic",
        ),
        "Hats": ("beanie, bucket hat, fedora, sun hat", "wool, straw, felt, corduroy", "small, medium, large, packable"),
    },
    "Bath": {
        "Soaps": (
            "soap bar, shampoo bar, shower gel, shaving soap",
            "olive-oil, goat's-milk, charcoal, oatmeal",
            "75 g, 100 g, 250 ml, set of 3",
        ),
        "Towels": (
            "bath towel, hand towel, bath mat, hammam towel",
            "waffle, terry, organic-cotton, bamboo",
            "30 x 50 cm, 50 x 100 cm, 70 x 140 cm, set of 2",
        ),
        "Skin care": (
            "face cream, body balm, hand serum, lip balm",
            "shea, aloe, rosehip, calendula",
            "15 ml, 50 ml, 100 ml, refill",
        ),
        "Scented candles": (
            "scented candle, diffuser, incense, room spray",
            "beeswax, soy, coconut-wax, cedar",
            "small, tall, three wicks, in a tin",
        ),
    },
    "Electronics": {
        "Headphones": (
            "headphones, earbuds, gaming headset, bone-conduction headset",
            "wireless, wired, noise-cancelling, foldable",
            "over-ear, on-ear, in-ear, with case",
        ),
        "Speakers": (
            "bluetooth speaker, bookshelf speaker, soundbar, shower speaker",
            "walnut, fabric, waterproof, aluminium",
            "mini, medium, pair, party size",
        ),
        "Chargers": (
            "power bank, charging stand, travel adapter, solar charger",
            "fast, magnetic, folding, fabric-wrapped",
            "5,000 mAh, 10,000 mAh, 20,000 mAh, 65 watts",
        ),
        "Home sensors": (
            "thermostat, door sensor, air monitor, light switch",
            "wireless, battery-free, glass-front, low-energy",
            "single, pack of 2, pack of 4, with hub",
        ),
    },
    "Pets": {
        "Dog gear": (
            "dog lead, collar, dog coat, harness",
            "leather, webbing, waxed-cotton, padded",
            "small, medium, large, extra large",
        ),
        "Cat furniture": (
            "scratching post, cat hammock, cat tree, litter house",
            "sisal, plywood, felt, seagrass",
            "40 cm, 80 cm, 120 cm, wall-mounted",
        ),
        "Pet feeding": (
            "feeding bowl, water fountain, treat jar, snuffle mat",
            "ceramic, steel, bamboo, silicone",
            "200 ml, 500 ml, 1 litre, raised",
        ),
        "Aquariums": (
            "aquarium, aquarium light, fish cave, plant set",
            "glass, acrylic, slate, ceramic",
            "20 litres, 60 litres, 120 litres, nano",
        ),
    },
}
"""Department -> subtype -> (nouns, materials, sizes or variants), each a list separated by comma and space."""

USES: Final[dict[str, tuple[str, ...]]] = {
    "Kitchen": (
        "for slow suppers and quick breakfasts",
        "for anyone who cooks every day",
        "for long Sunday lunches with friends",
    ),
    "Outdoors": ("for nights under the stars", "for long trails and wet weather", "for a weekend in the mountains"),
    "Garden": (
        "for balconies, beds and borders",
        "for people who like soil under their nails",
        "for the first warm days of spring",
    ),
    "Music": (
        "for practice at home and evenings on stage",
        "for beginners and players who came back",
        "for songs around the table",
    ),
    "Fitness": ("for training at home or on the road", "for the first hour of the morning", "for people who keep going"),
    "Stationery": ("for ideas worth keeping", "for a tidy desk and a clear head", "for letters written by hand"),
    "Toys": ("for rainy afternoons", "for small hands and big plans", "for the whole family on the floor"),
    "Bedroom": ("for deep sleep and slow mornings", "for a calm room at night", "for cold nights and late reading"),
    "Fashion": ("for every day and the odd celebration", "for city walks in any season", "for travelling light"),
    "Bath": ("for a quiet half hour behind a closed door", "for sensitive skin", "for a bathroom that smells of holidays"),
    "Electronics": (
        "for commutes, desks and long flights",
        "for a home that looks after itself",
        "for sound and power wherever you are",
    ),
    "Pets": ("for companions with opinions", "for long walks and longer naps", "for animals that own the house"),
}
"""Department -> what its things are for."""

STYLES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "rustic": {
        "words": ("rustic", "farmhouse", "hand-hewn", "countryside"),
        "traits": ("with the honest marks of the workshop", "rough to the touch and made to age well"),
    },
    "minimalist": {
        "words": ("minimalist", "pared-back", "plain", "Nordic"),
        "traits": ("with clean lines and nothing too much", "quiet in form and calm in colour"),
    },
    "vintage": {
        "words": ("vintage", "retro", "mid-century", "old-school"),
        "traits": ("modelled on a find from the 1950s", "with the charm of a flea-market discovery"),
    },
    "playful": {
        "words": ("playful", "colourful", "cheerful", "candy-striped"),
        "traits": ("in colours that make people smile", "with a joke hidden in the pattern"),
    },
    "luxury": {
        "words": ("luxury", "gilded", "hand-finished", "signature"),
        "traits": ("finished by hand down to the last detail", "presented in a box that feels like a present"),
    },
    "rugged": {
        "words": ("rugged", "heavy-duty", "expedition", "storm-proof"),
        "traits": ("tested in wind, rain and mud", "built to take knocks for twenty years"),
    },
    "eco": {
        "words": ("eco-friendly", "zero-waste", "plant-dyed", "planet-kind"),
        "traits": (
            "made with renewable energy and packed without plastic",
            "fully compostable or repairable at the end of its life",
        ),
    },
    "smart": {
        "words": ("smart", "connected", "app-controlled", "high-tech"),
        "traits": ("with an app, updates and clever little sensors", "that learns how you use it"),
    },
    "bohemian": {
        "words": ("bohemian", "hand-woven", "folk-patterned", "sun-faded"),
        "traits": ("with tassels, knots and a taste of far places", "each piece a little different from the next"),
    },
    "classic": {
        "words": ("classic", "heritage", "timeless", "tailored"),
        "traits": ("drawn the same way since our founder's day", "that will never look out of date"),
    },
}
"""Style -> the words that show it, one of which is in most titles, and its traits, one of which is in every description."""

BRANDS: Final[dict[str, tuple[str, ...]]] = {
    "rustic": ("Hearth & Pine", "Millstone Lane", "Oak and Ember"),
    "minimalist": ("Linje", "Plainwork", "Studio Halv"),
    "vintage": ("Penny Arcade Goods", "Fifty-Seven", "Marlow Revival"),
    "playful": ("Hullabaloo", "Jolly Otter", "Pip & Pop"),
    "luxury": ("Maison Verre", "Aurelian", "Castellane"),
    "rugged": ("Ironridge", "Basecamp North", "Granite Works"),
    "eco": ("Leafwise", "Second Spring", "Kindroot"),
    "smart": ("Voltara", "Pixelhaus", "Nodeline"),
    "bohemian": ("Saffron Road", "Wild Loom", "Casa Errante"),
    "classic": ("Harrow & Sons", "Whitcombe", "Old Quay"),
}
"""Style -> the brands that mostly work in it."""

FEATURES: Final = (
    "Easy to clean.",
    "Two-year guarantee.",
    "Made in small batches.",
    "Ships in recycled card.",
    "A favourite of our own team.",
    "Comes with care instructions.",
    "Spare parts are available.",
    "A good first present.",
)
"""Closing words that say nothing about taste."""

HOBBIES: Final[dict[str, str]] = {
    "Kitchen": "cooks most evenings",
    "Outdoors": "spends weekends hiking and camping",
    "Garden": "grows vegetables and flowers",
    "Music": "plays in a small band",
    "Fitness": "trains before work",
    "Stationery": "writes letters and keeps a journal",
    "Toys": "is always looking for presents for children",
    "Bedroom": "cares about a good night's sleep",
    "Fashion": "loves putting outfits together",
    "Bath": "believes in long baths",
    "Electronics": "follows every new gadget",
    "Pets": "lives with two demanding animals",
}
"""Department -> how a bio says it."""

REGIONS: Final = ("north", "south", "east", "west")
BUDGETS: Final = ("thrifty", "moderate", "generous")
DEVICES: Final = ("phone", "desktop", "tablet")
SURFACES: Final = ("home", "search", "newsletter")
