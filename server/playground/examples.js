// The examples, with the equations that lead to their answers: what each step should say.

export const EXAMPLES = [
  {
    "name": "Apples",
    "question": "Tom has 12 apples. He buys 7 more and gives 5 to Anna. How many apples does he have left?",
    "equations": ["12+7=19", "19-5=14"]
  },
  {
    "name": "Stickers",
    "question": "Tim fills 4 buckets. Each bucket holds 11 stickers. Later, he purchases another 33 stickers from Jake. How many stickers does he have altogether now?",
    "equations": ["4*11=44", "44+33=77"]
  },
  {
    "name": "Stamps",
    "question": "Julia filled 7 cases. Each case held 7 stamps. On Monday, Julia broke 5 of the stamps. How many stamps does she have left?",
    "equations": ["7*7=49", "49-5=44"]
  },
  {
    "name": "Cakes",
    "question": "Carlos gets $101 from his neighbor. Then he buys 11 cakes for $9 each. How much does he still have?",
    "equations": ["11*9=99", "101-99=2"]
  },
  {
    "name": "Shells",
    "question": "Mia had 45 shells. She shared them equally among 5 friends and kept none. Each friend found 2 more. How many shells does each friend have?",
    "equations": ["45/5=9", "9+2=11"]
  }
];
