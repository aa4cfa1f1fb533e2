"""Words for what pictures commonly show, to name clusters with where the user gives none."""

from __future__ import annotations

_GROUPS = {
    "people": """person, man, woman, child, baby, family, crowd, face, smile, portrait, hand, foot, eye, wedding, party,
        dancer, athlete, doctor, cook, farmer, police officer, firefighter, soldier, student, teacher, musician""",
    "animals": """animal, cat, kitten, dog, puppy, horse, cow, pig, sheep, goat, rabbit, mouse, squirrel, hedgehog, fox,
        wolf, bear, panda, koala, lion, tiger, leopard, elephant, giraffe, zebra, rhinoceros, hippopotamus, camel, deer,
        kangaroo, monkey, gorilla, bat, bird, chicken, duck, goose, swan, owl, eagle, parrot, peacock, flamingo,
        penguin, turtle, snake, lizard, crocodile, dinosaur, dragon, unicorn, frog, fish, shark, whale, dolphin, seal,
        octopus, squid, crab, lobster, shrimp, snail, butterfly, bee, ant, beetle, ladybug, spider, caterpillar""",
    "plants": """plant, tree, palm tree, forest, leaf, grass, flower, rose, tulip, sunflower, cactus, mushroom, herb,
        bouquet, garden""",
    "food": """food, fruit, apple, pear, orange, lemon, banana, pineapple, mango, peach, cherry, strawberry, grapes,
        watermelon, kiwi, coconut, avocado, tomato, potato, carrot, corn, cucumber, broccoli, onion, garlic, pepper,
        eggplant, salad, soup, bread, croissant, pancakes, cheese, egg, meat, steak, bacon, hamburger, hot dog, pizza,
        sandwich, taco, sushi, noodles, rice, pasta, cake, pie, cookie, doughnut, chocolate, candy, ice cream, honey,
        milk, coffee, tea, wine, beer, cocktail""",
    "travel": """car, taxi, bus, truck, tractor, motorcycle, scooter, bicycle, train, tram, subway, airplane,
        helicopter, rocket, satellite, ship, sailboat, canoe, ferry, anchor, road, bridge, traffic light, map, suitcase,
        tent""",
    "places": """house, building, skyscraper, castle, church, mosque, temple, hospital, school, factory, office, shop,
        restaurant, stadium, museum, statue, fountain, tower, street, city, village, farm, beach, island, desert,
        mountain, volcano, river, waterfall, lake, sea, sky, cave, field, park""",
    "weather": """sun, sunset, moon, star, cloud, rain, rainbow, lightning, snow, snowman, fog, wind, tornado, fire,
        wave, water drop, night, fireworks""",
    "home": """room, kitchen, bathroom, bed, chair, couch, table, lamp, door, window, mirror, toilet, bathtub, shower,
        cup, plate, bowl, bottle, fork, knife, spoon, pan, candle, broom, bucket, toy, teddy bear, balloon, gift,
        vase""",
    "tools": """hammer, screwdriver, wrench, saw, axe, scissors, key, lock, chain, magnet, ladder, toolbox, gear, pen,
        pencil, paintbrush, ruler, paper clip, book, newspaper, letter, envelope, calendar, chart, document, money,
        coin, credit card, light bulb, flashlight, battery, plug, computer, laptop, keyboard, telephone, smartphone,
        camera, television, radio, printer, clock, watch, microscope, telescope, test tube, syringe, pill, bandage""",
    "clothes": """clothes, shirt, dress, trousers, jacket, coat, hat, cap, crown, glasses, sunglasses, shoe, boot,
        high heel, sock, glove, scarf, tie, bag, backpack, umbrella, ring, necklace, jewellery""",
    "leisure": """ball, soccer, basketball, tennis, baseball, golf, swimming, skiing, running, yoga, boxing, medal,
        trophy, chess, dice, playing cards, puzzle, video game, guitar, piano, violin, drum, trumpet, microphone,
        headphones, music, painting, drawing, sculpture, theatre, circus, carousel""",
    "signs": """sign, symbol, logo, text, letter of the alphabet, number, arrow, heart, flag, warning sign, circle,
        square, triangle, diagram, screenshot, pattern, cartoon, skull, ghost, robot, alien, angel, devil""",
}

#: About 400 nouns, each once.
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(" ".join(word.split()) for group in _GROUPS.values() for word in group.split(","))
)
