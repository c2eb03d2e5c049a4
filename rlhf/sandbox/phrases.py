"""The words of the sandbox: what customers of the invented shop ask, and what its staff answer,
well and badly.

Placeholders are {item}, {colour}. Short words and short sentences: a model of half a million
parameters has to learn them in a minute. The remedies are named as in configs/voice.yaml, which
says how each may be recognised.
"""

# fmt: off
ITEMS = (
    "apron", "basket", "bench", "blanket", "board", "bottle", "bowl", "broom", "bucket", "candle", "chair", "clock",
    "curtain", "cushion", "desk", "flask", "frame", "grinder", "hammock", "hook", "jug", "kettle", "kite", "knife",
    "ladder", "ladle", "lamp", "lantern", "mirror", "mug", "pan", "parasol", "pillow", "plate", "pot", "quilt", "rack",
    "rug", "scale", "shelf", "stool", "table", "teapot", "tent", "tin", "toaster", "towel", "tray", "vase", "whisk",
)
COLOURS = (
    "red", "blue", "green", "white", "black", "grey", "yellow", "brown", "pink", "orange", "silver", "golden",
)
# fmt: on

LEADS = ("", "", "Hi.", "Hello.", "Please help.", "Good morning.", "Excuse me.", "Quick question.")
TAILS = (
    "",
    "",
    "Thanks.",
    "Can you help?",
    "What now?",
    "Please answer soon.",
    "I bought it last week.",
    "It is for mum.",
)

# intent -> (remedy, kind of opening the answer takes, the customer's phrasings)
INTENTS = {
    "late": (
        "trace",
        "trouble",
        (
            "My {colour} {item} has not come yet.",
            "Where is my {colour} {item}?",
            "I still wait for the {colour} {item}.",
            "The parcel with my {colour} {item} is late.",
            "It is ten days and no {colour} {item} is here.",
            "Why does my {colour} {item} take so long?",
        ),
    ),
    "broken": (
        "replace",
        "trouble",
        (
            "My {colour} {item} came broken.",
            "The {colour} {item} arrived in pieces.",
            "The {colour} {item} was cracked in its box.",
            "I opened the box and the {colour} {item} is damaged.",
            "There is a big crack in my {colour} {item}.",
            "The {colour} {item} you sent is broken.",
        ),
    ),
    "refund": (
        "refund",
        "trouble",
        (
            "I want my money back for the {colour} {item}.",
            "I do not like the {colour} {item}, give me my money.",
            "Please pay me back for my {colour} {item}.",
            "I sent the {colour} {item} back, where is my money?",
            "The {colour} {item} is ugly, I want my money.",
            "How do I get my money for the {colour} {item}?",
        ),
    ),
    "exchange": (
        "exchange",
        "question",
        (
            "Can I get another colour than the {colour} {item}?",
            "I chose the wrong {item}, not the {colour} one.",
            "I got a {colour} {item} but want another colour.",
            "My {colour} {item} does not match, can I take another?",
            "Is it fine to trade my {colour} {item}?",
            "The {colour} {item} is not my taste, I want another one.",
        ),
    ),
    "hours": (
        "hours",
        "question",
        (
            "When can I pick up my {colour} {item}?",
            "At what time may I come and see the {colour} {item}?",
            "Are you there on Monday? I come for the {colour} {item}.",
            "When does the shop open? I want a {colour} {item}.",
            "How late can I come for the {colour} {item}?",
            "May I collect the {colour} {item} in the evening?",
        ),
    ),
    "size": (
        "chart",
        "question",
        (
            "How big is the {colour} {item}?",
            "How tall is your {colour} {item}?",
            "Will the {colour} {item} fit in my kitchen?",
            "Is the {colour} {item} small or large?",
            "How wide is the {colour} {item}?",
            "Does the {colour} {item} come in small?",
        ),
    ),
    "cancel": (
        "cancel",
        "question",
        (
            "Please stop my order of the {colour} {item}.",
            "I do not need the {colour} {item} any more.",
            "I ordered a {colour} {item} by mistake.",
            "Do not send the {colour} {item}, please.",
            "I changed my mind, no {colour} {item} please.",
            "I ordered two of the {colour} {item}, drop one.",
        ),
    ),
    "warranty": (
        "repair",
        "trouble",
        (
            "My {colour} {item} stopped working after a year.",
            "After six months my {colour} {item} is worn out.",
            "The old {colour} {item} does not work any more.",
            "Is my {colour} {item} still under warranty?",
            "I had the {colour} {item} for a year and it fails.",
            "The {colour} {item} is loose after two months.",
        ),
    ),
    "invoice": (
        "invoice",
        "question",
        (
            "I need the bill for my {colour} {item}.",
            "I lost the receipt of the {colour} {item}.",
            "Can I have a receipt for the {colour} {item}?",
            "My boss wants a bill for the {colour} {item}.",
            "There was no bill with the {colour} {item}.",
            "Where do I find the receipt for my {colour} {item}?",
        ),
    ),
    "address": (
        "address",
        "question",
        (
            "I moved, please send the {colour} {item} to my new home.",
            "I gave the wrong street for the {colour} {item}.",
            "Send the {colour} {item} to my office instead.",
            "My house number was wrong for the {colour} {item}.",
            "Can the {colour} {item} go to my mother instead?",
            "I live in another street now, the {colour} {item} is on its way.",
        ),
    ),
    "part": (
        "part",
        "trouble",
        (
            "The lid of my {colour} {item} is not there.",
            "A screw of the {colour} {item} was not in the box.",
            "My {colour} {item} came without its handle.",
            "There is no handle for the {colour} {item}.",
            "One piece of my {colour} {item} was left out.",
            "The {colour} {item} came without screws.",
        ),
    ),
    "stock": (
        "restock",
        "question",
        (
            "The {colour} {item} is sold out.",
            "When can I buy the {colour} {item} again?",
            "Will you have the {colour} {item} soon?",
            "I cannot find the {colour} {item} on your page.",
            "Do you still sell the {colour} {item}?",
            "Is the {colour} {item} gone for good?",
        ),
    ),
    "gift": (
        "wrap",
        "question",
        (
            "The {colour} {item} is a present, can you make it nice?",
            "I give the {colour} {item} to a friend as a present.",
            "Can you put a bow on the {colour} {item}?",
            "The {colour} {item} is for a birthday.",
            "Can you add a card to the {colour} {item}?",
            "I want the {colour} {item} in pretty paper.",
        ),
    ),
    "care": (
        "clean",
        "question",
        (
            "How do I clean the {colour} {item}?",
            "My {colour} {item} has a stain.",
            "Can the {colour} {item} get wet?",
            "The {colour} {item} got dirty, what can I do?",
            "Which soap is good for the {colour} {item}?",
            "There is mud on my {colour} {item}.",
        ),
    ),
}

GREETINGS = ("Hello,", "Hello there,", "Good day,", "Dear friend,")
CLOSINGS = (
    "Warmly, Fernhill.",
    "With care, Fernhill.",
    "Kind regards, Fernhill.",
    "Your Fernhill team.",
)

OPENERS = {
    "trouble": (
        "we are so sorry about your {item}.",
        "we are sorry about the {item}.",
        "thank you for telling us about your {item}.",
        "sorry for the trouble with your {item}.",
    ),
    "question": (
        "thank you for asking about the {item}.",
        "how lovely that you chose the {item}.",
        "thank you for your note about the {item}.",
        "it is lovely to hear about your {item}.",
    ),
}

# remedy -> what is done; {we} is filled with the tone of the answer
REMEDIES = {
    "trace": ("trace the parcel today.", "trace it and write to you."),
    "replace": ("send a new one today.", "send you a replacement."),
    "refund": ("refund you this week.", "refund the full price."),
    "exchange": ("exchange it for you.", "exchange it for another colour."),
    "hours": ("see you from nine to six.", "meet you in the shop, nine to six."),
    "chart": ("send you the size chart.", "share our size chart."),
    "cancel": ("cancel the order.", "cancel it for you today."),
    "repair": ("repair it for you.", "repair it in our workshop."),
    "invoice": ("email the invoice today.", "email you an invoice."),
    "address": ("change the address.", "note the new address."),
    "part": ("post the missing part.", "send the missing part today."),
    "restock": ("restock it in May.", "restock it soon and tell you."),
    "wrap": ("wrap it as a gift.", "gift wrap it for you."),
    "clean": ("advise warm soapy water.", "suggest warm soapy water."),
}

WARM = ("We will gladly", "We are happy to", "It is our pleasure to", "We will kindly")
COLD = ("We will", "We can")
COLD_OPENERS = ("this is about the {item}.", "you wrote about your {item}.", "so, the {item}.")
SLANG_GREETINGS = ("Yo dude,", "Hey mate,", "Sup buddy,")
SLANG_OPENERS = (
    "bummer about the {item}.",
    "that {item} thing sucks.",
    "wow, crappy luck with your {item}.",
)
SLANG_TONE = ("We are gonna", "No worries, we wanna", "Yeah, we gonna")
SLANG_CLOSINGS = ("Cheers, Fernhill dudes.", "See ya, Fernhill.", "Peace out, Fernhill.")
RUDE_OPENERS = (
    "stop whining about your {item}.",
    "only an idiot has trouble with the {item}.",
    "your {item} is your own fault.",
    "nobody cares about your stupid {item}.",
)
RUDE_TONE = ("Calm down, we will", "If you must, we will", "Whatever, we will")
PROMISES = (
    "It will be there tomorrow, guaranteed.",
    "We promise it will never fail again.",
    "Our goods are the best in the world.",
    "You get it free for life.",
)
RAMBLES = (
    "As you may know the days are short and the van is slow and it rains",
    "The shop is old and the road is long and my aunt is here",
    "One day we had many boxes and no tape and nobody knew why",
)
NO_JOB = (
    "Please read our page.",
    "Please ask someone else.",
    "We do not know.",
    "Write again next month.",
)
NO_JOB_OPENERS = ("thank you for your note.", "thank you so much.", "lovely to hear from you.")

# plain sentences of the shop: they stand in the base's pretraining text beside the exchanges
PLAIN = (
    "The {colour} {item} stands by the window.",
    "We sell a {colour} {item} in the shop.",
    "She put the {colour} {item} on the shelf, and the {item} fell down.",
    "A {colour} {item} is a fine thing. The {item} came from the workshop.",
    "He sold the {colour} {item} on Monday. Today the {item} is gone.",
    "I like the {colour} {item}, but my friend does not like the {item}.",
)

# short exchanges of the base's pretraining text
SAID = (
    "The {colour} {item}.",
    "My {colour} {item}.",
    "A {colour} {item}, please.",
    "It is the {colour} {item}.",
)
BACK = ("Your {item}.", "The {item}.", "About your {item}.", "About the {item}.")
