/**
`npm run integrity -- --streams 10000 --bytes 20G`: the integrity suite at its full size, accelerated, half of it in each arrangement and the last tenth while acceleration is
switched and agents are killed. Ends with 1 if any byte was wrong or any stream hung.
*/
import {parseArgs} from 'node:util';
import {World} from '../helpers/world.js';
import {allLocal, disturb, oneHop, type Arrangement} from './arrangements.js';
import {runH13, runHalfRead, runStreams, startStreams, streamsResult, type StreamsResult} from './streams.js';

const USAGE = 'full [--streams N] [--bytes N[K|M|G]] [--max-bytes N[K|M|G]] [--seed N] [--lanes N] [--hung SECONDS] [--recipe-rounds N] [--duplex N[K|M|G]]';

interface Options {
	readonly streams: number;
	readonly bytes: number;
	readonly maxBytes: string;
	readonly seed: number;
	readonly lanes: string;
	/** Seconds without progress. */
	readonly hung: string;
	/** Of both recipes of KERNEL.md H13. */
	readonly recipeRounds: string;
	/** Bytes each way between a client that blocks, with two threads, and a server, on four connections. */
	readonly duplex: string;
}

/** @returns undefined for misuse. */
function parseOptions(): Options | undefined {
	try {
		const {values} = parseArgs({options: {
			streams: {type: 'string', default: '10000'},
			bytes: {type: 'string', default: '20G'},
			'max-bytes': {type: 'string', default: '64M'},
			seed: {type: 'string', default: String(Math.floor(Date.now() / 1000))},
			lanes: {type: 'string', default: '128'},
			hung: {type: 'string', default: '10'},
			'recipe-rounds': {type: 'string', default: '50'},
			duplex: {type: 'string', default: '1280M'},
		}});
		const [streams, seed] = [Number(values.streams), Number(values.seed)];
		const [, digits, unit] = /^(\d+)([KMG]?)$/.exec(values.bytes) ?? [];
		const bytes = Number(digits) * 1024 ** ' KMG'.indexOf(unit || ' ');
		return Number.isInteger(streams) && streams >= 10 && Number.isInteger(seed) && Number.isInteger(bytes) 
			? {streams, bytes, seed, maxBytes: values['max-bytes'], lanes: values.lanes, hung: values.hung, recipeRounds: values['recipe-rounds'], duplex: values.duplex} : undefined;
	} catch {
		return undefined;
	}
}

const ended: Array<() => void | Promise<void>> = [];

async function clean(): Promise<void> {
	for (const act of ended.splice(0).reverse()) {
		await act();
	}
}

interface Part {
	readonly title: string;
	readonly arrange: (world: World) => Promise<Arrangement>;
	readonly share: number;
	readonly disturbed?: true;
}

const PARTS: readonly Part[] = [
	{title: 'one hop', arrange: oneHop, share: 0.45},
	{title: 'all hops local', arrange: allLocal, share: 0.45},
	{title: 'all hops local, disturbed', arrange: allLocal, share: 0.1, disturbed: true},
];

/** @returns whether everything was whole, and accelerated. */
async function runPart({title, arrange, share, disturbed}: Part, index: number, {streams, bytes, maxBytes, seed, lanes, hung, recipeRounds, duplex}: Options): Promise<StreamsResult & {readonly good: boolean}> {
	const arrangement = await arrange(World.create({teardown: act => ended.push(act)}));
	const {client, server, to, redirectedBytes} = arrangement;
	const running = startStreams(client, server, to, ['--seed', String(seed + index), '--streams', String(Math.ceil(streams * share)), '--bytes', String(Math.ceil(bytes * share)), '--max-bytes', maxBytes, '--lanes', lanes, '--hung', hung]);
	const disturbance = disturbed ? await disturb(arrangement, running.ended, 500) : {};
	const {result, text} = await streamsResult(running);
	process.stdout.write(text);
	const recipes: object[] = [];
	let whole = result.wrong + result.hung === 0;
	if (!disturbed) {
		for (const recipe of [runH13, runHalfRead]) {
			const {stuck, ...other} = await recipe(client, server, to[0]!, ['--rounds', recipeRounds, '--hung', hung]);
			recipes.push({recipe: recipe.name, stuck, ...other});
			whole &&= stuck === 0;
		}

		const {failures, result: {bytes, seconds}} = await runStreams(client, server, to, ['--duplex', duplex, '--streams', '4', '--lanes', '4', '--hung', hung]);
		recipes.push({recipe: 'runDuplex', failures, bytes, seconds});
		whole &&= failures.length === 0;
	}

	const redirected = redirectedBytes();
	const good = whole && redirected > 0;
	console.log(JSON.stringify({part: title, good, redirectedBytes: redirected, ...disturbance, recipes}));
	await clean();
	return {...result, good};
}

async function main(options: Options): Promise<boolean> {
	const results: Array<StreamsResult & {readonly good: boolean}> = [];
	for (const [index, part] of PARTS.entries()) {
		results.push(await runPart(part, index, options));
	}

	const sum = (key: 'streams' | 'bytes' | 'wrong' | 'hung') => results.reduce((total, result) => total + result[key], 0);
	const good = results.every(result => result.good);
	console.log(`${good ? 'whole' : 'FAILED'}: ${sum('streams')} streams, ${(sum('bytes') / 1024 ** 3).toFixed(1)} GiB, ${sum('wrong')} wrong, ${sum('hung')} hung (seed ${options.seed})`);
	return good;
}

const options = parseOptions();
if (!options) {
	console.error(USAGE);
	process.exit(2);
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
	process.once(signal, () => {
		void clean().finally(() => process.exit(130));
	});
}

try {
	process.exitCode = await main(options) ? 0 : 1;
} finally {
	await clean();
}
