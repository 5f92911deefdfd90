"""What the lives of authors who do not exist are put together from. Cities and years are real, the rest is made up."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


FIRST = listed(
    """Adra Belisar Corvina Dovan Elspira Faron Galiena Hadric Ismera Jorvik Kelda Lorcan Maribet Nerys Osmund Perrin
    Quilla Rosmund Sevrin Talitha Ulric Vesna Wendell Xanthe Yorick Zelmira Alaric Brisa Cassim Delphine Edrik Fenna
    Gideon Hesper Ivo Juna Kasimir Liora Magnus Nolwenn Oriel Piran Quentin Runa Silvan Thea Umberto Viola Wystan
    Ximena Yelena Zoran Aurel Bronwen Cyprian Dagny Emeric Florian Greta Horatio Ilka Jasper Kirsi Leander"""
)
LAST = listed(
    """Ashgrove Bellweather Cindermoor Dunwick Emberlane Fallowfield Greystone Hollowell Ironwood Juniperson Kestrelby
    Larkspur Marrowick Nightingold Oakhurst Pellinore Quickwater Ravenscar Saltmarsh Thornbury Underhall Vantabrook
    Wintercress Yarrowdale Zephyrine Applecote Brightwater Coppergate Drumlow Eastermoor Foxglove Gallowglass Harrowgate
    Inkwell Jackdaw Kindlewood Lanternby Mossgrave Netherfield Ottershaw Plumridge Quillfeather Rookwood Sparrowhill
    Tanglewood Umberleigh Velvetine Willowmere Yewdall Zandermoor Amberson Blackthorn Cloverley Dapplewood Elmsworth
    Frostgate Gorsemoor Hazelrigg Ivydene Jessamine Knotwell Loamfield Mistlethwaite Nettlecombe"""
)
CITIES = listed(
    """Lisbon Oslo Cairo Lima Prague Dublin Havana Nairobi Seoul Quito Vienna Athens Warsaw Jakarta Madrid Tunis Ottawa
    Helsinki Manila Bogota Zagreb Riga Tallinn Accra Dakar Santiago Budapest Kyoto Porto Bergen Krakow Geneva"""
)
YEARS = tuple(str(year) for year in range(1931, 1992))
GENRES = (
    "crime novels",
    "ghost stories",
    "love poems",
    "travel books",
    "science fiction",
    "fairy tales",
    "war novels",
    "political satire",
    "sea stories",
    "family sagas",
    "stage plays",
    "nature essays",
    "spy thrillers",
    "historical novels",
    "comic novels",
    "school stories",
)
JOBS = (
    "baker",
    "judge",
    "miner",
    "nurse",
    "pilot",
    "tailor",
    "florist",
    "dentist",
    "carpenter",
    "fisherman",
    "librarian",
    "musician",
    "locksmith",
    "surgeon",
    "gardener",
    "waiter",
    "blacksmith",
    "chemist",
    "postman",
    "farmer",
    "beekeeper",
    "teacher",
    "plumber",
    "butcher",
)
AWARDS = tuple(
    f"{name} {kind}"
    for name in listed("Amber Candle Falcon Granite Harbour Ivory Lantern Meridian Olive Silver Thistle Willow")
    for kind in ("Prize", "Medal")
)
ADJECTIVES = listed(
    "Broken Crimson Distant Empty Frozen Gentle Hidden Last Narrow Patient Quiet Restless Secret Silent Stolen Velvet "
    "Wandering Winter Forgotten Burning"
)
NOUNS = listed(
    "Anchor Bridge Clock Door Feather Garden Island Key Ladder Mirror Orchard Piano River Shadow Station Tower "
    "Umbrella Voyage Window Letter"
)
BOOKS = tuple(f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
SUBJECTS = (
    "law",
    "botany",
    "medicine",
    "philosophy",
    "geology",
    "history",
    "music",
    "physics",
    "economics",
    "theology",
    "chemistry",
    "sculpture",
    "astronomy",
    "engineering",
    "mathematics",
    "linguistics",
)
LANGUAGES = listed("Danish Catalan Welsh Finnish Persian Swahili Hungarian Greek Basque Polish Korean Tamil")
