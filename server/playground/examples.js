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
    "name": "Toys",
    "question": "There are 12 toys in Henry's bag. On Monday, Henry decides to give away 9. On Monday, Henry loses 2 toys at school. Then Henry buys 7 toys at the market. In total, how many toys does he have?",
    "equations": ["12-9=3", "3-2=1", "1+7=8"]
  },
  {
    "name": "Roses",
    "question": "Each basket had 5 roses, and there were 4 baskets. Now she went to the store and got 7 more. She divided them equally among 9 students. How many does each of them get?",
    "equations": ["5*4=20", "20+7=27", "27/9=3"]
  }
];
