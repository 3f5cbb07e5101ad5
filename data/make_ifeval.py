"""Make prompts with instructions that can be verified, as in IFEval (arXiv 2311.07911).

    # ifeval.jsonl with 2,048 training prompts, ifeval_eval.jsonl with 256 held-out ones
    python data/make_ifeval.py

A prompt asks for a few words about a topic and adds one to three instructions that a program can
check, such as "use no commas". A row has the fields of google/IFEval (key, prompt,
instruction_id_list, kwargs) and one more, `topic`: words that an answer about this topic would use.
No form of them stands in the prompt, so an answer that only repeats the prompt has none. Training
and held-out rows share no topic, no phrase of a request or an instruction, and no phrase to end
with. Kinds of instruction are drawn in proportion to google/IFEval's, the second and third among
those that can stand beside the first.

Two of the 25 kinds count sentences, or words in capitals, with nltk's sentence data, a download:

    python -c "import nltk; nltk.download('punkt_tab')"

They are left out where it is missing, as it was when the files in this directory were made.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiment_ifeval"))
from instructions import SENTENCE_KINDS, has_sentence_data, is_form_of  # noqa: E402

from if_verifiable.ifeval.instructions_registry import INSTRUCTION_CONFLICTS  # noqa: E402

DATA = Path(__file__).resolve().parent

# ---------------------------------------------------------------- topics
# A topic, then words that answers about it use. One with a hyphen stands for all that begin so.
# Most were written by hand. The last of some topics are words that SmolLM2's own answers about this
# topic used, and those about few others. No word of an assistant that says nothing is here (help,
# learn, people): a test has a list.
TRAIN_TOPICS = """
baking bread: yeast dough flour oven loaf loaves crust wheat butter toast slice knead rise rising
  warm water salt ingredient sandwich patience recipe
honey bees: hive pollen nectar queen flower colon- pollinat- swarm sting insect worker wax buzz
  garden
volcanoes: lava magma erupt ash mountain crater rock hot earth molten gas island pressure surface
  explo- crust wonders geological occurrence
the moon: orbit earth crater lunar night tide space astronaut gravity phase satellite sky surface
  light sun celestial terrestrial diameter
riding a bicycle: wheel pedal brake helmet handlebar road balance exercise gear path chain ride
  bike traffic adventure
coffee: bean caffeine roast brew cup morning drink espresso aroma energy milk flavor taste bitter
  freshly beverage
tea: leaf leaves brew cup water herbal drink caffeine china relax green steep flavor hot beverage
  camellia sinica plant smooth
elephants: trunk tusk africa herd ivory asia large mammal ear memory grass land animal weigh
  intelligen- roam
penguins: ice swim antarctic bird feather fish cold flightless egg colon- waddle south wing water
  mammals millions hemisphere
rain: cloud water umbrella drop weather wet storm plant puddle fall sky river evaporat- precipitat
  atmosphere atmospheric
the sun: star heat light energy earth planet solar hydrogen hot sky bright warm gas helium
  celestial orbits electromagnetic fusion
chess: board piece king queen pawn knight bishop rook strateg- checkmate opponent move player game
  puzzle civilizations
football: ball goal team player field score kick match stadium coach pass league sport game soccer
swimming: water pool stroke breath float lung muscle exercise ocean lap goggles wet body heart
  sport endurance
gardening: plant soil seed flower water vegetable weed grow sun compost tool dig fresh outdoor
  nature sustainable sufficiency
libraries: book shelf shelves quiet borrow librarian study card communit resource collection
  digital collections array
trains: track rail station passenger engine locomotive travel ticket carriage speed freight
  transport conductor journey
airplanes: wing pilot fly flight engine airport passenger sky air travel lift cloud speed
  transport skies machine aviation
dogs: bark tail puppy puppies loyal pet walk fetch bone breed friend animal paw companion
  intelligent
cats: purr whisker kitten meow pet paw mouse mice fur tail independent animal claw companion nap
  play intelligent loyal curiosity
horses: ride gallop mane hoof hooves stable saddle hay race farm animal strong rider grass tail
  equine
owls: night bird feather hunt eye wing nocturnal mouse mice prey hoot head silent predator mammals
sharks: ocean teeth fin predator fish sea swim prey water jaw species marine hunt intelligence
  rays
whales: ocean mammal sea blubber song breath swim water large migrat- marine blue krill dolphin
  blowhole cetacea
spiders: web silk leg insect eight venom prey fly flies catch spin arachnid bug eye
butterflies: wing caterpillar flower cocoon insect nectar color pollinat- chrysalis garden flutter
  egg transform metamorph-
frogs: pond jump tadpole leap amphibian croak water skin green insect egg tongue leg lily aquatic
  habitat
dinosaurs: fossil extinct reptile million bone species tyrannosaur prehistoric large asteroid
  plant meat earth museum giants
mountains: peak climb snow rock summit valley high hik- altitude slope range height earth
  landscape crust formations rise tectonic
rivers: water flow stream fish lake ocean bank boat sea source valley land fresh bridge aquatic
deserts: sand dry cactus cacti camel hot dune rain oasis heat water arid plant temperature
  conditions landscapes
forests: tree animal leaf leaves wood plant bird shade oxygen wild air path habitat green soil
  home biodiversity carbon sequestration climate flora
beaches: sand wave ocean sea sun swim shell water towel surf coast shore tan vacation relax
  snorkeling
snow: cold winter white ice flake ski sled melt freez- snowman crystal weather water ground
  atmosphere
winter: cold snow ice coat frost season january december warm freez- holiday temperature weather
spring: flower bloom warm season rain bird april blossom grow green march sun plant
pizza: cheese tomato crust dough oven slice topping sauce italian pepperoni mozzarella bake
  delicious food dish cuisine ingredients fusion margherita
chocolate: cocoa sweet milk dark candy bar sugar bean dessert treat melt taste delicious cacao
  flavor creamy
apples: fruit tree red crisp juice pie orchard sweet vitamin healthy green core fiber snack
  cuisine juicy genus
bananas: yellow fruit peel potassium tropical sweet bunch ripe monkey snack vitamin healthy energy
  fiber musa
rice: grain asia cook water paddy white brown food bowl meal staple dish carbohydrate field
  japanese cuisine crop
cheese: milk cow cheddar dairy aged aging flavor cream goat mold mozzarella food calcium protein
  taste cuisine recipe
soup: broth bowl vegetable hot spoon warm chicken cook tomato stew noodle meal ingredient comfort
  cuisine flavors mushrooms dish china originated
breakfast: egg morning toast cereal milk juice meal coffee energy pancake food healthy fresh
ice cream: cone vanilla scoop cold sweet dessert freez- frozen summer flavor chocolate dairy milk
  sugar ingredients creamy
guitars: string music chord play fret song acoustic strum band sound electric instrument melod-
  neck
the piano: key music play note melod- sound chord hand classical song string finger instrument
  pedal jazz
violins: string bow music orchestra play sound wood note instrument classical melod- chin concert
  viola bass double maple
dancing: music rhythm move body step ballet partner exercise express- feet joy art beat party
  dance
painting: brush color canvas art paint artist picture gallery oil watercolor express- museum
poetry: rhyme verse poem line emotion feeling express- imag rhythm stanza metaphor words language
  literary thoughts written
movies: film actor screen director theater watch stor- popcorn cinema scene character entertain
  drama genre audiences artists
photography: camera lens picture light image photo capture moment film shutter memor- focus- art
  frame visual stories
robots: machine program computer metal task sensor factor- artificial intelligen- automat- build
  arm potential
computers: program data screen keyboard software internet machine process memory code technolog-
  hardware
the internet: web connect online computer email website network search data communicat- social
  access interconnected devices collaboration servers tablets
telephones: call voice ring number communicat- device speak wireless bell conversation message
  wire distance smartphones digital
clocks: hour minute hand tick alarm watch second wall number measure pendulum morning schedule
  timekeeping navigate
bridges: river water cross steel road car connect span structure build arch traffic engineer
  suspension cities
castles: king tower knight stone wall moat medieval queen fortress defend defens- history gate
  royal structures fortifications architecture
lighthouses: ship light sea coast beam shore sailor tower rock night harbor warn navigat- beacon
  infrastructure communication
windmills: wind energy blade grain turn power electric farm rotat- water generat- flour renew
  dutch devices machine engineering industries agriculture kinetic mechanical
submarines: water ocean navy sea deep dive periscope ship vessel crew pressure torpedo explor
  engineering
sailing: boat wind sea water ocean mast ship lake harbor wave deck captain navigat- rope sport
  adventure speed sails
camping: tent fire nature forest sleep hike outdoor star tree bag backpack marshmallow cook wild
  lake
fishing: rod bait hook lake river boat catch water line lure patien- sea trout reel aquatic
skiing: snow slope mountain pole winter cold lift downhill boot resort balance ice sport speed
  skiers adventure
running: exercise leg shoe marathon race heart fitness mile fast jog healthy breath muscle body
  run
yoga: breath stretch pose mat body relax mind balance flexib- meditat- calm stress health strength
  wellness cultivating techniques sanskrit
sleep: rest night bed dream tired hour pillow body brain wake health energy mind recharge bodily
  development
dreams: sleep night mind brain imagin- subconscious nightmare wake memor- thought emotion vivid
  rest blur unconscious
money: dollar bank coin pay buy cash cost save spend currency purchase bill wealth price economy
  security financial regulations
schools: teach student class book child study lesson education grade friend homework institution
  development
doctors: patient hospital medicine health treat sick nurse disease illness care heal diagnos- body
  medical compassionate empathetic surgeons
firefighters: fire hose truck water rescue burn smoke ladder save building danger brave helmet
  emergency scene heroes communities
farmers: crop field animal tractor harvest cow plant food grow land soil seed corn vegetable
  agricultural products farming
teachers: student school class lesson education child study grade skill resources
astronauts: space rocket moon earth orbit suit nasa station gravity planet mission explore
  spacecraft scien- travel cosmos exploration
pirates: ship treasure sea gold sail captain island rob ocean sword parrot flag loot map crew
  roamed caribbean
candles: wax flame light wick burn scent warm melt room fire birthday glow dark dinner
mirrors: reflect glass image light face wall silver room surface shine clear
umbrellas: rain wet dry cover sun handle fold shade protect storm weather water canopy clothing
shoes: feet foot walk lace leather sole pair heel wear boot comfort run sneaker protect
glass: window sand transparent clear bottle break fragile light melt heat material cup drink
  architecture crystal dioxide silicon
paper: tree book wood pulp print recycl- page sheet note ink pen draw
gold: metal jewel ring yellow mine coin precious valu- shiny- rich money wealth rare ore
magnets: pole iron attract metal field repel force north south steel compass electric fridge
  material levitation
electricity: power light energy wire current charge lamp battery circuit electron home device
  appliance plug
batteries: energy power charge electric device chemical store phone car lithium current flashlight
  acid recharg-
planets: orbit sun earth mars jupiter star saturn space venus solar moon gas gravity system rock
  celestial home
comets: ice tail sun space orbit dust star solar rock gas telescope bright sky halley originate
rainbows: color rain sun light sky red blue drop arc violet green prism water bend
thunderstorms: lightning rain cloud loud sky electric wind weather flash hail strike dark sound
  power atmosphere
earthquakes: ground shake plate fault tremor building damage seismic richter crust magnitude move
  destr- tectonic disaster beneath societies energy
trees: leaf leaves root branch wood shade oxygen trunk bark forest fruit grow seed air
roses: flower thorn red petal garden bloom scent beaut- smell fragran- stem bouquet symbol color
  europe botanically
birthdays: cake candle gift party friend celebrat year present family wish age old balloon
music: song sound melod- rhythm instrument sing note emotion dance harmon- band express- language
  genre
friendship: trust care laugh loyal bond together honest romantic emotional
"""
EVAL_TOPICS = """
kites: wind fly string sky tail air paper high child color diamond kid park outdoor play sport
  derived lift aerodynamics aviation
turtles: shell slow reptile sea egg beach swim land water hard protect old ocean animal aquatic
bats: night wing fly cave mammal insect echo nocturnal hang sound upside hunt dark fruit
  chiroptera stealth
ants: colon- queen insect nest small food tunnel soil leg strong carry ground social
dolphins: ocean swim mammal sea intelligen- water jump fin fish play pod echolocat- marine sound
bears: forest fur hibernat- animal honey large claw winter cub fish wild brown sleep hunt salmon
  insects mammals carnivora
parrots: bird feather color beak mimic tropical green wing pet fly sound intelligen- seed plumage
  ravens
islands: water sea ocean beach land sand palm boat tropical surround coral shore coast isolat-
  reefs home marine continents forests kelp
glaciers: ice snow melt cold mountain water slow move freez- valley climate frozen river mass
  sheets
fog: cloud water visib- thick morning mist air weather low drive droplet grey gray ground condens-
  atmospheric pressure atmosphere cool layer precipitation
autumn: leaf leaves fall season color orange cool red harvest pumpkin october september crisp tree
tomatoes: red fruit salad sauce plant vine garden juic- ripe vegetable vitamin seed slice sweet
  diets
potatoes: fry fries vegetable mash root starch bake chip peel soil food skin cook brown boil dish
  america
pancakes: syrup butter batter breakfast flour egg milk flip stack pan sweet fluffy maple delicious
  ingredients american dish
salad: lettuce vegetable tomato healthy dress green fresh bowl cucumber leaf leaves oil carrot
  meal ingredients dish refreshing herbs protein
drums: beat music rhythm stick sound loud band play hit percussion instrument skin bass cymbal
  wood metal traditions egypt originated
the theater: stage actor play audience drama perform act curtain costume script scene music
  applau- theatre film venue entertainment
novels: book character stor- plot author page fiction chapter imagin- reader genre genres
  literature themes literary narratives
museums: art history exhibit paint artifact collect visit display culture past gallery sculpture
  ancient repositories treasure institutions preserved
tunnels: underground dark road train mountain dig car rock subway pass earth light construction
  energy
balloons: air helium party float color sky inflat- birthday pop string rubber gas round
boats: water sail sea lake river float row ocean fish engine wood paddle oar captain
bakeries: bread cake pastr- oven smell flour fresh cookie dough sweet baker croissant bun
  delicious baked products baking
nurses: patient hospital care doctor health medicine medical heal sick treat compassion clinic ill
  selfless field
tennis: racket ball court net player serve match game score hit opponent point sport tournament
hiking: trail mountain nature boot walk path forest backpack outdoor exercise climb fresh scen-
  adventure hikers
knitting: yarn needle wool sweater scarf stitch warm hand pattern loop hobb- thread craft relax
  hat story
telescopes: star lens planet moon sky space light astronom- mirror distant galax- far observ
  scientists cosmos research
compasses: north direction needle magnet navigat- map south point travel sailor explore east west
soap: clean wash hand water bubble dirt germ bath skin oil lather smell bacteria body ingredients
  glycerin softening
salt: food taste sea season flavor sodium mineral cook preserv- ocean crystal water white dish
  chloride chemical elements
clouds: sky rain water white weather vapor air fluffy float storm droplet high form condens- grey
  atmosphere atmospheric cells suspended enormous
wolves: pack howl hunt forest prey wild animal fur dog predator night leader moon teeth social
  mammals carnivorous wolf canidae lupus domesticated canis
markets: buy sell vendor fruit vegetable shop fresh stall product price customer food goods trade
  businesses economic
puzzles: piece solve brain picture mind challenge game fit problem jigsaw logic patien- cognitive
oak trees: acorn leaf leaves wood shade strong branch forest old bark root squirrel tall trunk
"""
# Words that answers about many topics of a sort use, and the topics that they are added to.
SORTS = """
creature animal species habitat wildlife behavio- ecosystem predator prey marine reptile: honey
  bees, elephants, penguins, dogs, cats, horses, owls, sharks, whales, spiders, butterflies,
  frogs, dinosaurs, turtles, bats, ants, dolphins, bears, parrots, wolves
plant nature flower leaf leaves fruit botan- ecosystem species garden cultivat- ornamental:
  gardening, forests, trees, roses, farmers, apples, bananas, tomatoes, potatoes, oak trees, tea
food delicious flavor taste tasty dish meal cuisine ingredient nutri- eat vitamin cook drink
  culinary recipe texture aroma beverage treat: baking bread, coffee, tea, pizza, chocolate,
  apples, bananas, rice, cheese, soup, breakfast, ice cream, tomatoes, potatoes, pancakes, salad,
  bakeries, salt
nature landscape earth environment ecosystem planet geolog- formation terrain water scenic:
  volcanoes, mountains, rivers, deserts, forests, beaches, earthquakes, islands, glaciers,
  camping, hiking
weather atmospher- climate season sky water vapor air phenomen- temperature: rain, snow, winter,
  spring, rainbows, thunderstorms, fog, autumn, clouds
celestial space star planet orbit universe cosmos solar sky astronom- night: the moon, the sun,
  planets, comets, astronauts, telescopes
sport physical exercise skill body health activit- compet- athlet- outdoor fitness recreation game
  adventure strateg-: riding a bicycle, football, swimming, dancing, fishing, skiing, running,
  yoga, sailing, camping, chess, tennis, hiking, puzzles, kites, gardening, knitting
art artist- creativ- emotion express- melod- audience perform- story stories cultur- beauty
  imagin- instrument listen sound entertain-: guitars, the piano, violins, dancing, painting,
  poetry, movies, photography, music, drums, the theater, novels, museums
device machine technolog- tool invention engineer- mechani- electr- equipment vehicle transport-:
  trains, airplanes, robots, computers, the internet, telephones, clocks, windmills, submarines,
  batteries, magnets, electricity, telescopes, compasses, boats, umbrellas, mirrors, balloons
building structure architectur- visit city cities town construct- public space built: libraries,
  bridges, castles, lighthouses, schools, museums, tunnels, markets, bakeries, the theater
profession- job skill- communit- dedicat- career serve: doctors, firefighters, farmers, teachers,
  astronauts, pirates, nurses
material object decorat- wear household product substance surface: candles, mirrors, umbrellas,
  shoes, glass, paper, gold, soap, salt, balloons, kites, knitting, puzzles
feeling happiness joy mind health celebrat-: sleep, dreams, money, birthdays, friendship, music,
  yoga
"""
# Topics with words in other languages, for the instruction that names a language.
FOREIGN_TRAIN_TOPICS = """
the sun|es: estrella luz calor tierra planeta energía cielo vida brilla caliente
the sun|fr: étoile lumière chaleur terre planète énergie ciel vie brill chaud
the sun|de: stern licht wärme erde planet energie himmel leben scheint warm
dogs|es: perro mascota animal amigo fiel leal casa compañer cola amor
dogs|fr: chien animal animaux ami fidèle loyal maison compagn queue amour
dogs|de: hund haustier tier freund treu begleiter schwanz liebe
rain|es: lluvia agua nube cielo planta clima gota paraguas tierra caer
rain|fr: pluie eau nuage ciel plante climat goutte parapluie terre tomb
rain|de: regen wasser wolke himmel pflanze wetter tropfen erde fällt nass
music|es: música sonido canción ritmo melod instrumento arte emoc canta
music|fr: musique son chanson rythme mélod instrument art émotion chant
music|de: musik lied klang rhythm melod instrument kunst gefühl sing ton
schools|es: escuela estudiant alumno aprend maestro profesor clase libro educa niñ
schools|fr: école étudiant élève apprend professeur classe livre éduca enfant
schools|de: schule schüler lern lehrer klasse buch bücher bildung kind
trees|es: árbol hoja bosque madera fruta raíz oxígeno aire verde planta
trees|fr: arbre feuille forêt bois fruit racine oxygène air vert plante
trees|de: baum bäume blatt blätter wald holz frucht wurzel luft grün pflanze
coffee|es: café taza bebida mañana grano cafeína energía sabor leche agua
coffee|fr: café tasse boisson matin grain caféine énergie goût lait eau
coffee|de: kaffee tasse getränk morgen bohne koffein energie geschmack milch wasser
friendship|es: amist amig confian amor vida compart
friendship|fr: amiti ami confiance amour vie partag personne
friendship|de: freund vertrauen liebe leben teilen
"""
FOREIGN_EVAL_TOPICS = """
salad|es: ensalada lechuga tomate verdura fresc comida aceite sal vegetal
salad|fr: salade laitue tomate légume frais repas huile sel fraîche
salad|de: salat tomate gemüse frisch essen öl gurke gesund
clouds|es: nube cielo agua lluvia blanc aire vapor tierra forma
clouds|fr: nuage ciel eau pluie blanc air vapeur terre form
clouds|de: wolke himmel wasser regen weiß luft dampf erde
the theater|es: teatro actor obra escena público arte drama historia
the theater|fr: théâtre acteur pièce scène public art drame histoire
the theater|de: theater schauspiel bühne stück publikum kunst drama
markets|es: mercado compra vend fruta producto comida precio
markets|fr: marché achet vend fruit produit prix légume
markets|de: markt kauf verkauf obst produkt preis gemüse
"""

# ---------------------------------------------------------------- phrases
# A third of each list is held out, see `split`.
REQUESTS = (
    "Write something about {topic}.",
    "Describe {topic}.",
    "Tell me something about {topic}.",
    "What should a child know about {topic}?",
    "Give me an interesting fact about {topic}.",
    "Explain in a few words why people care about {topic}.",
    "Write a little about {topic}.",
    "What comes to mind when you think of {topic}?",
    "What is special about {topic}?",
    "Give a short description of {topic}.",
    "What can you say about {topic}?",
    "State a simple fact about {topic}.",
    "Write a short text about {topic}.",
    "Say something about {topic}.",
    "Tell a friend about {topic} in a few words.",
    "What do you know about {topic}?",
    "Introduce {topic} to somebody new to the subject.",
    "Write a few words about {topic}.",
)
QUESTIONS = (
    "Do most people like {topic}?",
    "Is it worth knowing more about {topic}?",
    "Would the world be poorer without {topic}?",
    "Should {topic} be the subject of a school lesson?",
    "Should everybody know something about {topic}?",
    "Could you live without {topic}?",
    "Should people talk more about {topic}?",
)
END_PHRASES = (
    "That is all.",
    "Have a good day!",
    "I hope this helps.",
    "What do you think?",
    "And so it goes.",
    "Thank you for asking.",
    "Now you know.",
    "Enjoy!",
    "See you soon!",
    "Is it not wonderful?",
    "You are welcome to ask more.",
    "This is the end.",
    "Any other questions?",
    "Let me know.",
    "Until next time.",
    "What a world!",
    "Come back soon.",
    "Ask me again tomorrow.",
    "So much for today.",
    "Is there more to say?",
    "Take care!",
)
FIRST_WORDS = (
    "today",
    "people",
    "often",
    "many",
    "every",
    "when",
    "nature",
    "some",
    "once",
    "most",
    "indeed",
    "here",
    "sometimes",
)
LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German"}

# For each kind, ways to ask for it.
PHRASES = {
    "keywords:existence": (
        "Include the words {words}.",
        "Mention {words}.",
        "Your answer has to use {words}.",
        "Use the words {words} somewhere.",
        "Make sure to use the words {words}.",
        "Work the words {words} into your answer.",
        "Include the keywords {words} in your answer.",
        "The answer should contain {words}.",
        "Be sure to mention {words}.",
        "I want to read the words {words} in it.",
        "The words {words} must be in your answer.",
        "Say something with the words {words}.",
        "Put the words {words} in the text.",
        "Do not forget the words {words}.",
        "Write it with the words {words}.",
    ),
    "keywords:frequency": (
        "Use the word {word} at least {n} times.",
        "The word {word} must appear {n} or more times.",
        "Repeat the word {word} so that it is there at least {n} times.",
        "Say {word} at least {n} times.",
        "Let the word {word} occur {n} times or more.",
        "In your answer, write {word} at least {n} times.",
        "The word {word} should be in the answer at least {n} times.",
        "Include the word {word} {n} or more times.",
        "Mention {word} at least {n} times.",
        "I want to see the word {word} at least {n} times.",
        "Make sure that the word {word} is used {n} times or more.",
        "Write the word {word} no fewer than {n} times.",
        "Your answer has to use the word {word} at least {n} times.",
        "Put the word {word} in the text at least {n} times.",
        "At least {n} times, the answer should say {word}.",
    ),
    "keywords:forbidden_words": (
        "Do not use the words {words}.",
        "Avoid {words}.",
        "Leave out {words}.",
        "Never say {words}.",
        "You may not mention {words}.",
        "Write it without using {words}.",
        "Answer without the words {words}.",
        "The words {words} are not allowed.",
        "Do not include the words {words}.",
        "Keep the words {words} out of your answer.",
        "The words {words} are forbidden.",
        "Please avoid the words {words}.",
        "Do not mention {words}.",
        "Your answer must not contain {words}.",
        "Answer, but never use the words {words}.",
    ),
    "keywords:letter_frequency": (
        "The letter {letter} should appear {relation} {n} times.",
        "Use the letter {letter} {relation} {n} times.",
        "Let the letter {letter} occur {relation} {n} times.",
        "Write the letter {letter} {relation} {n} times.",
        "Count the letter {letter}: it should be there {relation} {n} times.",
        "Your answer should have the letter {letter} {relation} {n} times.",
        "Include the letter {letter} {relation} {n} times.",
        "The letter {letter} should be there {relation} {n} times.",
        "I want to see the letter {letter} {relation} {n} times.",
        "In the answer, the letter {letter} must be found {relation} {n} times.",
        "Make sure that the letter {letter} is used {relation} {n} times.",
        "Put the letter {letter} in your answer {relation} {n} times.",
        "The answer must contain the letter {letter} {relation} {n} times.",
    ),
    "language:response_language": (
        "Answer in {language}.",
        "Reply in the {language} language.",
        "Write only {language}.",
        "Please respond in {language}.",
        "I only understand {language}.",
        "Use the {language} language for everything.",
        "Your entire answer should be in {language}.",
        "Use no language but {language}.",
        "Give the answer in {language}.",
        "Write your answer in {language}, please.",
        "The answer must be in {language}.",
        "Say it in {language}.",
        "No other language than {language} is allowed.",
        "Write the whole answer in {language}.",
        "Speak {language} to me.",
    ),
    "length_constraints:number_sentences": (
        "Write {relation} {n} sentences.",
        "Your answer should have {relation} {n} sentences.",
        "Use {relation} {n} sentences.",
        "The length should be {relation} {n} sentences.",
        "Keep to {relation} {n} sentences.",
        "Answer in {relation} {n} sentences.",
        "Say it in {relation} {n} sentences.",
        "Give {relation} {n} sentences.",
        "There should be {relation} {n} sentences.",
        "I want {relation} {n} sentences.",
        "The answer must have {relation} {n} sentences.",
        "Make it {relation} {n} sentences long.",
    ),
    "length_constraints:number_paragraphs": (
        "Write {n} paragraphs and separate them with ***.",
        "Give {n} short paragraphs with *** between them.",
        "Put *** between the {n} paragraphs of your answer.",
        "Write exactly {n} paragraphs, with the line *** after each but the last.",
        "Split the answer into {n} paragraphs by writing *** between them.",
        "There should be {n} paragraphs, separated with the divider ***",
        "Your answer should have {n} paragraphs. Separate them with ***",
        "I want {n} paragraphs with *** in between.",
        "Use *** to separate the {n} paragraphs.",
        "Make {n} short paragraphs and write *** between them.",
        "Answer in {n} paragraphs, divided by ***",
        "The answer must have exactly {n} paragraphs, with *** between them.",
        "Divide your answer into {n} paragraphs with the divider ***",
    ),
    "length_constraints:number_words": (
        "Use {relation} {n} words.",
        "Answer with {relation} {n} words.",
        "The answer should be {relation} {n} words long.",
        "The length should be {relation} {n} words.",
        "Say it in {relation} {n} words.",
        "The whole answer should have {relation} {n} words.",
        "Write {relation} {n} words.",
        "Your answer must have {relation} {n} words.",
        "Answer in {relation} {n} words.",
        "There should be {relation} {n} words.",
        "Make it {relation} {n} words long.",
        "I want {relation} {n} words.",
        "Give an answer of {relation} {n} words.",
        "In total, write {relation} {n} words.",
        "Its length should be {relation} {n} words.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        "Write {n} paragraphs with an empty line between them. Paragraph {nth} must begin "
        "with the word {word}.",
        "There should be {n} paragraphs, divided by two line breaks, and paragraph {nth} "
        "starts with {word}.",
        "Give {n} paragraphs with an empty line between them. Start paragraph {nth} with {word}.",
        "Use two line breaks to make {n} paragraphs; the first word of paragraph {nth} is {word}.",
        "Write {n} short paragraphs separated by a blank line. Begin paragraph {nth} with the "
        "word {word}.",
        "Answer in {n} paragraphs with a blank line between them. The word {word} begins "
        "paragraph {nth}.",
        "Make {n} paragraphs, with an empty line between two of them, and begin paragraph "
        "{nth} with {word}.",
    ),
    "detectable_content:number_placeholders": (
        "Use at least {n} placeholders in square brackets, such as [name].",
        "Leave {n} or more blanks in square brackets, such as [place] or [date].",
        "Include {n} or more placeholders in square brackets, for example [name].",
        "Put at least {n} things in square brackets for me to fill in, like [time].",
        "Make it a template with at least {n} fields such as [number].",
        "It should contain at least {n} placeholders in square brackets, such as [city].",
        "Your answer must have at least {n} placeholders like [address].",
        "Write at least {n} placeholders in square brackets, like [person].",
        "There should be {n} or more placeholders, such as [country], in the text.",
        "At least {n} places should be left open in square brackets, such as [color].",
        "Add {n} or more placeholders, for example [title].",
        "Use square brackets for at least {n} placeholders, as in [animal].",
        "I want at least {n} placeholders in the answer, like [year].",
    ),
    "detectable_content:postscript": (
        "At the end, add a postscript that starts with {marker}",
        "Close with a postscript beginning with {marker}",
        "Do not forget a postscript that begins with {marker}",
        "Finish with a postscript that begins with {marker}",
        "Below the answer, add a note that starts with {marker}",
        "After your answer, please write a postscript starting with {marker}",
        "Add a postscript with {marker} at the end of your answer.",
        "There should be a postscript at the end, starting with {marker}",
        "Write a postscript too, and begin it with {marker}",
        "Your answer should end with a postscript that starts with {marker}",
        "Put a postscript after the answer; it starts with {marker}",
        "Include a postscript: {marker} and then another thought.",
    ),
    "detectable_format:number_bullet_lists": (
        "Answer with exactly {n} bullet points, such as * this one.",
        "Write a list of exactly {n} items that start with *",
        "Give exactly {n} bullets, and start each with an asterisk (*).",
        "Use exactly {n} bullet points, each on a line that begins with *",
        "Write it as exactly {n} bullet points:\n* first point\n* next point",
        "Make a list with exactly {n} bullet points (* like this).",
        "Your answer must have exactly {n} bullet points. Begin each with *",
        "I want exactly {n} bullet points, such as:\n* this is a point",
        "The answer should be a list of exactly {n} bullet points with * before each.",
        "List exactly {n} points, each with * in front of it.",
        "There should be exactly {n} bullets (* one) in your answer.",
        "Put the answer into exactly {n} bullet points, * like this.",
        "Use markdown bullets: exactly {n} lines that start with *",
    ),
    "detectable_format:constrained_response": (
        "Say one of 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.', and "
        "give a reason.",
        "Begin with 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.' and then "
        "explain it.",
        "Answer with 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.' and a "
        "short reason.",
        "Your answer must contain 'My answer is yes.', 'My answer is no.' or 'My answer is "
        "maybe.', and the reason.",
        "Choose one of 'My answer is yes.', 'My answer is no.' and 'My answer is maybe.', "
        "then say why.",
        "Start with one of these: 'My answer is yes.', 'My answer is no.', 'My answer is "
        "maybe.' Then give a reason.",
        "Use 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.', and say why "
        "you think so.",
        "Include one of 'My answer is yes.', 'My answer is no.' and 'My answer is maybe.' "
        "with an explanation.",
        "Pick 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.' and explain "
        "your choice.",
    ),
    "detectable_format:number_highlighted_sections": (
        "Highlight at least {n} parts with asterisks, like *this*.",
        "Mark {n} or more phrases like *this one*.",
        "Put at least {n} phrases between asterisks, such as *this phrase*.",
        "Emphasise {n} or more phrases with asterisks, like *phrase*.",
        "At least {n} parts should be *highlighted* like that.",
        "Highlight {n} or more phrases with markdown, i.e. *highlighted*.",
        "Highlight at least {n} sections of your answer with markdown, such as *this section*.",
        "There should be {n} or more highlighted parts, i.e. *highlighted part*.",
        "Use asterisks to highlight at least {n} parts, for example *this*.",
        "Your answer must have at least {n} phrases that are *highlighted*.",
        "Please highlight {n} or more important phrases, like *important*.",
        "Make at least {n} parts stand out with asterisks, as in *this part*.",
        "In your answer, mark at least {n} phrases with *asterisks*.",
    ),
    "detectable_format:multiple_sections": (
        "Write {n} sections and begin each with {splitter} and its number, as in {splitter} 1",
        "Divide the answer into {n} parts that are headed {splitter} 1, {splitter} 2 and so on.",
        "Give {n} sections. Head them {splitter} 1, {splitter} 2 and so on.",
        "The answer needs {n} sections, each starting with {splitter} and its number (1, 2, ...).",
        "Put the headings {splitter} 1 to {splitter} {n} before the parts of your answer.",
        "Use {n} sections titled {splitter} 1 to {splitter} {n}.",
        "Your answer must have {n} sections. Mark the beginning of each with {splitter} X, "
        "such as {splitter} 1",
        "Make {n} sections, called {splitter} 1, {splitter} 2 and so on.",
        "There should be {n} short sections with the headings {splitter} 1 to {splitter} {n}.",
        "Split your answer into {n} sections: {splitter} 1, then {splitter} 2, and so on.",
        "Answer in {n} sections, and start each with {splitter} and its number (1, 2, ...).",
        "Structure it as {n} sections, from {splitter} 1 to {splitter} {n}.",
    ),
    "detectable_format:json_format": (
        "Give the answer as one JSON object.",
        "Answer in JSON and write nothing else.",
        "Write your answer as JSON.",
        "Return only a JSON object.",
        "Format the entire reply as JSON, in braces.",
        "The whole output must be a JSON object.",
        "Use the JSON format for your answer.",
        "Wrap the entire answer in JSON.",
        "Your answer should be valid JSON.",
        "Please reply in JSON format.",
        "I want the answer as a JSON object and nothing around it.",
        "Output JSON only.",
        "Put everything you say into one JSON object.",
    ),
    "detectable_format:title": (
        "Give it a title in double angular brackets, such as <<my title>>.",
        "Start with a title like <<this>>.",
        "Write a title above it, wrapped like <<this title>>.",
        "Put a heading in double angular brackets first, as in <<heading>>.",
        "It needs a title, written as <<title>>.",
        "The answer must contain a title in double angular brackets, i.e. <<title>>.",
        "Include a title wrapped in double angular brackets, such as <<a good title>>.",
        "Your answer should have a title, for example <<the title>>.",
        "Add a title in << and >>.",
        "Begin with a title, such as <<what it is about>>.",
        "There must be a title in double angular brackets: <<your title>>.",
        "Find a title for your answer and write it like <<this>>.",
        "Use double angular brackets for a title, like <<some title>>.",
    ),
    "combination:two_responses": (
        "Give two different answers and put ****** between them.",
        "Write one answer, then a line with ******, then another answer.",
        "Answer twice, in different words, with ****** between the two answers.",
        "Give me two answers. Separate them with six asterisks: ******",
        "Write two versions and divide them with ******",
        "I want two different versions, with ****** in between.",
        "Give two different responses, separated by six asterisks: ******",
        "Your answer should have two versions. Put ****** between them.",
        "Answer in two different ways, separated by ******",
        "Write two different answers, with a line of ****** between the first and the second.",
        "There should be two answers with ****** between them.",
        "Make two different responses and separate them with ******",
    ),
    "combination:repeat_prompt": (
        "First repeat the request above word for word, then answer it.",
        "Before you answer, copy the request above without any change.",
        "Copy the request above first, exactly as it is, and then give your answer.",
        "Write the request above again, without changing a word, before your answer.",
        "Say the request above again word by word, then answer.",
        "Begin by repeating the request above exactly and then give the answer.",
        "Repeat the request above without change, and then answer it.",
        "First, write the request above once more exactly; then give your answer.",
        "Your answer should begin with the request above, word for word.",
    ),
    "startend:end_checker": (
        'End with the exact words: "{phrase}"',
        'Your last words must be: "{phrase}"',
        'Close your answer with these words: "{phrase}"',
        'The last thing that you write must be: "{phrase}"',
        'Put this at the very end: "{phrase}"',
        'Finish by writing exactly this: "{phrase}"',
        'Finish your answer with this exact phrase: "{phrase}"',
        'At the end, write: "{phrase}"',
        'Your answer should end with: "{phrase}"',
        'Let the answer end with these words: "{phrase}"',
        'The final words should be: "{phrase}"',
        'End your answer with this sentence: "{phrase}"',
        'No words may follow this phrase at the end: "{phrase}"',
    ),
    "change_case:capital_word_frequency": (
        "Write {relation} {n} words in ALL CAPITALS.",
        "Use {relation} {n} words in capital letters.",
        "Put {relation} {n} words in ALL CAPS.",
        "There should be {relation} {n} words that are all CAPITALS.",
        "WRITE {relation} {n} words LIKE THIS.",
        "Let {relation} {n} words be in CAPITALS.",
        "Your answer should have {relation} {n} words in ALL CAPITAL letters.",
        "In the answer, {relation} {n} words should be in CAPITAL LETTERS.",
        "I want {relation} {n} words to be in ALL CAPS.",
    ),
    "change_case:english_capital": (
        "Answer in English and in capital letters only.",
        "Write everything in CAPITAL letters, in English.",
        "Your English answer should be in ALL CAPS.",
        "Use only capital letters and English.",
        "SHOUT: English, all in capital letters.",
        "USE CAPITAL LETTERS FOR THE WHOLE ENGLISH ANSWER.",
        "Your entire answer should be in English and in all capital letters.",
        "I want an English answer in CAPITAL LETTERS only.",
        "Write the whole answer in English with every letter in capitals.",
    ),
    "change_case:english_lowercase": (
        "Answer in English and in lowercase letters only.",
        "Use no capital letters, only lowercase English.",
        "Your English answer must have no capital letters.",
        "Keep every letter small (lowercase), in English.",
        "Use lowercase for all letters, even the first, in English.",
        "write the whole english answer in lowercase.",
        "Your entire answer should be in English and in all lowercase letters.",
        "No capital letters are allowed, and the answer must be in English.",
        "I want an English answer in lowercase letters only.",
        "write in english, and use lowercase only.",
    ),
    "punctuation:no_comma": (
        "Do not use any commas.",
        "Use no commas in your answer.",
        "Avoid commas.",
        "Commas are forbidden.",
        "Write it without a comma.",
        "Leave out all commas.",
        "Answer without commas.",
        "There must be no comma in the answer.",
        "Do not put any commas in your answer.",
        "No commas, please.",
        "Your answer should not contain a comma.",
        "I do not want to see any commas.",
        "Commas are not allowed.",
        "Refrain from the use of commas.",
        "Keep commas out of it.",
    ),
    "startend:quotation": (
        "Put the whole answer in double quotation marks.",
        'Wrap your answer in double "quotation marks".',
        "Start and end your answer with a double quotation mark.",
        "Everything you write must be inside double quotation marks.",
        'Give the answer as a quote: "like this".',
        'Your whole answer should be a "quotation" in double quotes.',
        "Wrap your entire answer with double quotation marks.",
        "The answer must be inside double quotation marks.",
        "Your answer begins and ends with double quotation marks.",
        'Use double quotation marks around the whole answer, "like so".',
        "Write the answer between double quotes.",
        "I want the whole answer in double quotes.",
        "Put double quotation marks before and after your answer.",
    ),
}

# How often google/IFEval's 541 prompts ask for each kind, the weights that kinds are drawn with.
COUNTS = {
    "punctuation:no_comma": 66,
    "length_constraints:number_sentences": 52,
    "length_constraints:number_words": 52,
    "keywords:forbidden_words": 49,
    "detectable_format:number_highlighted_sections": 48,
    "keywords:frequency": 42,
    "combination:repeat_prompt": 41,
    "startend:quotation": 41,
    "keywords:existence": 39,
    "change_case:english_lowercase": 39,
    "detectable_format:title": 37,
    "keywords:letter_frequency": 33,
    "detectable_format:number_bullet_lists": 31,
    "language:response_language": 31,
    "length_constraints:number_paragraphs": 27,
    "detectable_content:number_placeholders": 27,
    "startend:end_checker": 26,
    "detectable_content:postscript": 26,
    "change_case:capital_word_frequency": 25,
    "change_case:english_capital": 25,
    "combination:two_responses": 24,
    "detectable_format:json_format": 17,
    "detectable_format:multiple_sections": 14,
    "length_constraints:nth_paragraph_first_word": 12,
    "detectable_format:constrained_response": 10,
}

# ---------------------------------------------------------------- which instructions go together
# These shape the whole answer; in a short one there is room for one of them.
SHAPES = {
    "length_constraints:number_paragraphs",
    "length_constraints:nth_paragraph_first_word",
    "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
    "combination:two_responses",
    "combination:repeat_prompt",
}
# Beside those that the checkers' own table names: pairs that a short answer cannot obey together,
# or whose checkers look at the same characters.
CONFLICTS = {
    "length_constraints:number_words": SHAPES,
    "length_constraints:number_sentences": SHAPES | {"length_constraints:number_words"},
    "language:response_language": SHAPES
    | {"keywords:letter_frequency", "detectable_content:postscript"},
    "keywords:forbidden_words": {"keywords:existence", "keywords:frequency"},
    "keywords:existence": {"keywords:frequency"},
    "detectable_format:number_highlighted_sections": {
        "detectable_format:number_bullet_lists",  # a line that begins with *this* is a bullet
        "length_constraints:number_paragraphs",  # *** counts as a highlight
    },
    "detectable_format:multiple_sections": {
        "change_case:english_capital",  # "Section" is written so
        "change_case:english_lowercase",
    },
    "startend:quotation": {
        "length_constraints:nth_paragraph_first_word",
        "detectable_format:number_bullet_lists",  # the first line begins with the quotation mark
    },
    "combination:repeat_prompt": {"detectable_format:title"},  # both want the first line
    "detectable_format:title": {"length_constraints:nth_paragraph_first_word"},
    "startend:end_checker": {"detectable_content:postscript"},  # both want the last line
    "change_case:english_lowercase": {"startend:end_checker", "detectable_content:postscript"},
    "keywords:letter_frequency": {"startend:end_checker", "detectable_format:multiple_sections"},
}


def can_stand_together(kind: str, other: str) -> bool:
    for table in (INSTRUCTION_CONFLICTS, CONFLICTS):
        if other in table.get(kind, ()) or kind in table.get(other, ()):
            return False
    return kind != other and not {kind, other} <= SHAPES


# ---------------------------------------------------------------- rows
@dataclass
class Topic:
    name: str
    words: list[str]  # that answers use; one that ends in "-" is the beginning of a word
    language: str = "en"

    @property
    def whole_words(self) -> list[str]:
        """Those that can be asked for, which "pollinat-" cannot."""
        return [word for word in self.words if not word.endswith("-")]


@dataclass
class Part:
    """Topics and phrases of the training rows, or of the held-out ones."""

    topics: list[Topic]
    requests: list[str]
    questions: list[str]
    end_phrases: list[str]
    first_words: list[str]
    phrases: dict[str, list[str]]


def lines_of(text: str) -> list[list[str]]:
    """[what stands before the colon, what stands behind it] of each entry."""
    return [line.split(": ") for line in text.strip().replace("\n  ", " ").splitlines()]


def read_topics(text: str, foreign: str) -> list[Topic]:
    topics = []
    for head, words in lines_of(text) + lines_of(foreign):
        name, _, language = head.partition("|")
        topics.append(Topic(name, words.split(), language or "en"))
    for words, names in lines_of(SORTS):
        for topic in topics:
            if topic.language == "en" and topic.name in names.split(", "):
                topic.words += [word for word in words.split() if word not in topic.words]
    return topics


def joined(words: list[str]) -> str:
    return " and ".join(words)


NOUNS = "placeholder|blank|thing|field|place|part|phrase|section"  # "1 place", but "2 places"


def make_instruction(
    kind: str, topic: Topic, request: str, part: Part, draw: random.Random
) -> tuple[str, dict]:
    """(an instruction's text, the arguments of its checker)."""
    phrase = draw.choice(part.phrases[kind])
    relation = draw.choice(("at least", "less than"))
    spoken = {"relation": relation.replace("less", "fewer")}
    n = draw.randint(2, 3)
    arguments = {}
    if kind == "keywords:existence":
        words = draw.sample(topic.whole_words[:6], draw.randint(1, 2))
        arguments = {"keywords": words}
        spoken["words"] = joined(words)
        if len(words) == 1:
            phrase = phrase.replace("words {words}", "word {words}")
    elif kind == "keywords:frequency":
        word = draw.choice(topic.whole_words[:4])
        arguments = {"keyword": word, "frequency": n, "relation": "at least"}
        spoken["word"] = word
    elif kind == "keywords:forbidden_words":
        words = draw.sample(topic.whole_words[:5], 2)
        arguments = {"forbidden_words": words}
        spoken["words"] = joined(words)
    elif kind == "keywords:letter_frequency":
        letter = draw.choice("bckmpvwy")
        arguments = {"letter": letter, "let_frequency": n, "let_relation": relation}
        spoken["letter"] = letter
    elif kind == "language:response_language":
        arguments = {"language": topic.language}
        spoken["language"] = LANGUAGES[topic.language]
    elif kind == "length_constraints:number_sentences":
        arguments = {"num_sentences": n, "relation": relation}
    elif kind == "length_constraints:number_paragraphs":
        arguments = {"num_paragraphs": n}
    elif kind == "length_constraints:number_words":
        n = 5 * (draw.randint(3, 6) if relation == "at least" else draw.randint(3, 5))
        arguments = {"num_words": n, "relation": relation}
    elif kind == "length_constraints:nth_paragraph_first_word":
        nth = draw.randint(1, n)
        word = draw.choice(part.first_words)
        arguments = {"num_paragraphs": n, "nth_paragraph": nth, "first_word": word}
        spoken |= {"nth": nth, "word": word}
    elif kind == "detectable_content:number_placeholders":
        n = draw.randint(1, 2)
        arguments = {"num_placeholders": n}
    elif kind == "detectable_content:postscript":
        marker = draw.choice(("P.S.", "P.P.S"))
        arguments = {"postscript_marker": marker}
        spoken["marker"] = marker
    elif kind == "detectable_format:number_bullet_lists":
        arguments = {"num_bullets": n}
    elif kind == "detectable_format:number_highlighted_sections":
        n = draw.randint(1, 2)
        arguments = {"num_highlights": n}
    elif kind == "detectable_format:multiple_sections":
        splitter = draw.choice(("Section", "SECTION"))
        arguments = {"section_spliter": splitter, "num_sections": n}
        spoken["splitter"] = splitter
    elif kind == "combination:repeat_prompt":
        arguments = {"prompt_to_repeat": request}
    elif kind == "startend:end_checker":
        ending = draw.choice(part.end_phrases)
        arguments = {"end_phrase": ending}
        spoken["phrase"] = ending
    elif kind == "change_case:capital_word_frequency":
        arguments = {"capital_frequency": n, "capital_relation": relation}
    text = phrase.format(n=n, **spoken)
    return re.sub(rf"\b1 ({NOUNS})s\b", r"1 \1", text), arguments


def choose(kinds: list[str], draw: random.Random) -> str:
    return draw.choices(kinds, [COUNTS[kind] for kind in kinds])[0]


def make_row(part: Part, kinds: list[str], draw: random.Random) -> dict:
    first = choose(kinds, draw)
    is_foreign = first == "language:response_language"
    topics = [topic for topic in part.topics if (topic.language != "en") == is_foreign]
    topic = draw.choice(topics)
    chosen = [first]
    wanted = draw.choices((1, 2, 3), (60, 30, 10))[0]
    while len(chosen) < wanted:
        fitting = [kind for kind in kinds if all(can_stand_together(kind, k) for k in chosen)]
        # The language is chosen with the topic.
        fitting = [kind for kind in fitting if kind != "language:response_language"]
        if not fitting:
            break
        chosen.append(choose(fitting, draw))

    requests = part.requests
    if first == "detectable_format:constrained_response":
        requests = part.questions
    request = draw.choice(requests).format(topic=topic.name)
    request = request[0].upper() + request[1:]
    texts = [request]
    all_arguments = []
    for kind in chosen:
        text, arguments = make_instruction(kind, topic, request, part, draw)
        texts.append(text)
        all_arguments.append(arguments)
    prompt = texts[0]
    for before, text in zip(texts, texts[1:]):
        # What ends in a sign that is asked for, such as ***, ends its line.
        prompt += (" " if before[-1] in '.!?"' else "\n") + text
    words = topic.words
    if is_foreign:  # their words have many endings; short ones would begin other words too
        words = [word + "-" if len(word) > 4 else word for word in words]
    asked = set(re.findall(r"\w+", prompt.lower()))
    name = re.findall(r"\w+", topic.name)
    return {
        "prompt": prompt,
        "instruction_id_list": chosen,
        "kwargs": all_arguments,
        "topic": [word for word in words if not is_in_prompt(word, asked, name)],
    }


def is_in_prompt(entry: str, asked: set[str], name: list[str]) -> bool:
    """Whether a form of a topic's word stands in the prompt: "hive" where it asks for "hives".

    asked: the prompt's words; name: those of the topic. Nothing that begins as the topic does may
    stay either: not skiers where the topic is skiing.
    """
    for word in asked:
        if is_form_of(entry, word) or is_form_of(word, entry):
            return True
    return any(entry[:3] == word[:3] for word in name if word != "the")


def make_rows(part: Part, kinds: list[str], count: int, first_key: int, seed: str) -> list[dict]:
    """Rows with prompts of their own."""
    draw = random.Random(seed)
    rows = {}
    while len(rows) < count:
        row = make_row(part, kinds, draw)
        rows.setdefault(row["prompt"], {"key": first_key + len(rows), **row})
    return list(rows.values())


def split(texts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(training, held out): a third is held out, drawn by chance, and the same in every call."""
    held_out = random.Random(repr(texts)).sample(texts, len(texts) // 3)
    return [text for text in texts if text not in held_out], held_out


def parts() -> tuple[Part, Part]:
    """(training, held out)."""
    topics = (TRAIN_TOPICS, FOREIGN_TRAIN_TOPICS), (EVAL_TOPICS, FOREIGN_EVAL_TOPICS)
    lists = [split(texts) for texts in (REQUESTS, QUESTIONS, END_PHRASES, FIRST_WORDS)]
    phrases = {kind: split(texts) for kind, texts in PHRASES.items()}
    train, held_out = [
        Part(
            read_topics(*topics[i]),
            *[texts[i] for texts in lists],
            {kind: texts[i] for kind, texts in phrases.items()},
        )
        for i in (0, 1)
    ]
    return train, held_out


@dataclass
class Options:
    seed: int = 0
    train: int = 2048  # training prompts
    held_out: int = 256
    output: Path = DATA  # the directory


def main(options: Options) -> None:
    if options.train < 1 or options.held_out < 1:
        sys.exit("error: --train and --held-out must be at least 1")
    kinds = sorted(PHRASES)
    if not has_sentence_data():
        kinds = [kind for kind in kinds if kind not in SENTENCE_KINDS]
        advice = "python -c \"import nltk; nltk.download('punkt_tab')\""
        print(f"left out for want of nltk's sentence data: {', '.join(SENTENCE_KINDS)} ({advice})")
    train, held_out = parts()
    files = {
        "ifeval.jsonl": make_rows(train, kinds, options.train, 1, f"train {options.seed}"),
        "ifeval_eval.jsonl": make_rows(
            held_out, kinds, options.held_out, 10001, f"held out {options.seed}"
        ),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = options.output / name
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(rows)} prompts")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
