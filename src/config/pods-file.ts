/**
The pods file: which pods to enrol, and where their connections go. Pure; README.md describes the format.
*/
import path from 'node:path';
import {LineCounter, parseDocument} from 'yaml';
import {InputError} from '../errors.js';
import {canonicalAddress} from '../maps/address.js';
import {MARKS_MAX, type Mark} from '../maps/schema.js';
import {ISTIO_DEFAULTS, ambientCapture, decideEnrolment, sidecarCapture, warningsOf, type NodeDefaults, type PodMetadata} from '../redirect/annotations.js';
import type {Capture} from '../redirect/capture.js';

export interface PodSpec {
	/** Unique; usually namespace/name. */
	readonly name: string;
	/** The network namespace's file, a process in it, or what looks for its file (and throws PodError): one of the three. */
	readonly netns?: string;
	readonly pid?: number;
	readonly findNetns?: () => string;
	/** The pod's addresses; read from the namespace when left out. */
	readonly ips?: readonly string[];
	/** Its deletion was asked for: that its namespace is gone is no failure. */
	readonly isEnding?: boolean;
	readonly wish: Wish;
}

/** What is to be done with the pod; a refusal concerns this pod only, and leaves it as it is. */
export type Wish =
	| {readonly capture: Capture; readonly warnings: readonly string[]}
	| {readonly leave: string}
	/** Nothing can be done yet, and what was done before stays. */
	| {readonly waiting: string}
	| {readonly refused: InputError};

const NAME_MAX_BYTES = 319;
const UINT32_MAX = 0xff_ff_ff_ff;

/**
@param file - its name, for messages.
@throws InputError that names the file and the value: `pods.yaml: pods[1].proxy.port: …`. The whole file is refused.
*/
export function parsePodsFile(text: string, file: string): readonly PodSpec[] {
	const lineCounter = new LineCounter();
	const document = parseDocument(text, {lineCounter, uniqueKeys: true});
	const [syntax] = document.errors;
	if (syntax) {
		const {line, col} = lineCounter.linePos(syntax.pos[0]);
		throw new InputError(`${file}:${line}:${col}`, syntax.message.split('\n', 1)[0]!.replace(/ at line .*$/, ''));
	}

	let value: unknown;
	try {
		// maxAliasCount stops documents that grow without bound through aliases.
		value = document.toJS({maxAliasCount: 100});
	} catch (error) {
		throw new InputError(file, (error as Error).message, {cause: error});
	}

	const top = new Reader(value, file, '').object(['pods']);
	const pods = top.get('pods').list().map(parsePod);
	const names = new Map<string, number>();
	for (const [index, {name}] of pods.entries()) {
		const first = names.get(name);
		if (first !== undefined) {
			throw new InputError(`${file}: pods[${index}].name`, `'${name}' is also the name of pods[${first}]`);
		}

		names.set(name, index);
	}

	return pods;
}

function parsePod(reader: Reader): PodSpec {
	const pod = reader.object(['name', 'netns', 'pid', 'ips', 'mode', 'proxy', 'exempt', 'acceleration', 'dns', 'labels', 'annotations', 'namespaceLabels']);
	const name = pod.get('name').text();
	if (Buffer.byteLength(name) > NAME_MAX_BYTES || !/^[\w.:/-]+$/.test(name)) {
		pod.get('name').refuse(`expected letters, digits and any of . : / _ -, at most ${NAME_MAX_BYTES} of them`);
	}

	if (pod.has('netns') === pod.has('pid')) {
		reader.refuse('expected exactly one of netns and pid');
	}

	const mode = pod.has('mode') ? pod.get('mode').oneOf(['proxy', 'ambient', 'sidecar', 'auto'] as const) : 'proxy';
	const stranger = (mode === 'proxy' ? ['dns', 'labels', 'annotations', 'namespaceLabels'] : ['exempt']).find(key => pod.has(key));
	if (stranger !== undefined) {
		pod.get(stranger).refuse(`has no meaning in mode ${mode}`);
	}

	const acceleration = pod.has('acceleration') ? pod.get('acceleration').oneOf(['off', 'auto', 'on'] as const) : 'auto';
	const wish: Wish = mode === 'proxy' ? {capture: parseProxyCapture(pod), warnings: []} : wishOf(mode, name, pod);
	return {
		name,
		...(pod.has('netns') ? {netns: pod.get('netns').absolutePath()} : {pid: pod.get('pid').integer(1, 4_194_304)}),
		...(pod.has('ips') ? {ips: addressPerFamily(pod.get('ips'))} : {}),
		wish: 'capture' in wish ? {...wish, capture: {...wish.capture, acceleration}} : wish,
	};
}

function parseProxyCapture(pod: Fields): Capture {
	const proxy = pod.get('proxy').object(['port', 'addresses']);
	const port = proxy.get('port').integer(1, 65_535);
	const exempt = pod.has('exempt') ? pod.get('exempt').object(['marks', 'uids', 'gids', 'cgroups']) : undefined;
	const exemptList = (key: string) => exempt?.has(key) ? exempt.get(key).list() : [];
	const marks = exemptList('marks').map(parseMark);
	if (marks.length > MARKS_MAX) {
		exempt!.get('marks').refuse(`at most ${MARKS_MAX} are possible`);
	}

	return {
		mode: 'proxy',
		exempt: {
			marks,
			uids: exemptList('uids').map(item => item.integer(0, UINT32_MAX - 1)),
			gids: exemptList('gids').map(item => item.integer(0, UINT32_MAX - 1)),
			cgroups: exemptList('cgroups').map(item => item.absolutePath()),
		},
		outbound: {port, ...(proxy.has('addresses') ? {addresses: addressPerFamily(proxy.get('addresses'))} : {}), excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
		keepSource: false,
		excludeInterfaces: [],
	};
}

/** By the pod's labels and annotations, as Kubernetes has them. `dns` and `proxy` stand for what the mesh's installation says. */
function wishOf(mode: 'ambient' | 'sidecar' | 'auto', name: string, pod: Fields): Wish {
	const proxy = pod.has('proxy') ? pod.get('proxy').object(['uid', 'gid']) : undefined;
	const id = (key: string, otherwise: number) => proxy?.has(key) ? proxy.get(key).integer(0, UINT32_MAX - 1) : otherwise;
	const dns = pod.has('dns') ? pod.get('dns').boolean() : undefined;
	const texts = (key: string) => pod.has(key) ? pod.get(key).texts() : {};
	const metadata: PodMetadata = {name, labels: texts('labels'), annotations: texts('annotations'), namespaceLabels: texts('namespaceLabels')};
	const defaults: NodeDefaults = {
		...ISTIO_DEFAULTS,
		ambientDns: dns ?? ISTIO_DEFAULTS.ambientDns,
		sidecarDns: dns ?? ISTIO_DEFAULTS.sidecarDns,
		sidecarUid: id('uid', ISTIO_DEFAULTS.sidecarUid),
		sidecarGid: id('gid', ISTIO_DEFAULTS.sidecarGid),
	};
	try {
		if (mode !== 'auto') {
			const capture = mode === 'ambient' ? ambientCapture(metadata, defaults) : sidecarCapture(metadata, defaults);
			return {capture, warnings: warningsOf(metadata, capture)};
		}

		const enrolment = decideEnrolment(metadata, defaults);
		return enrolment.enrol ? enrolment : {leave: enrolment.why};
	} catch (error) {
		if (error instanceof InputError) {
			return {refused: error};
		}

		throw error;
	}
}

function addressPerFamily(reader: Reader): readonly string[] {
	const addresses = reader.list().map(item => item.address());
	if (addresses.length === 0) {
		reader.refuse('expected at least one address');
	}

	for (const family of ['IPv4', 'IPv6']) {
		if (addresses.filter(address => address.includes(':') === (family === 'IPv6')).length > 1) {
			reader.refuse(`expected at most one ${family} address`);
		}
	}

	return addresses;
}

/** `0x539`, `1337`, `0x539/0xfff`, as iptables writes them. */
function parseMark(reader: Reader): Mark {
	const text = String(reader.value);
	const match = /^(0x[\da-f]{1,8}|\d{1,10})(?:\/(0x[\da-f]{1,8}|\d{1,10}))?$/i.exec(text);
	const value = Number(match?.[1]);
	const mask = match?.[2] === undefined ? UINT32_MAX : Number(match[2]);
	if (!match || value > UINT32_MAX || mask > UINT32_MAX) {
		return reader.refuse(`expected a mark such as 0x539 or 0x539/0xfff, got ${JSON.stringify(reader.value)}`);
	}

	if (mask === 0) {
		reader.refuse('a mask of 0 would exempt every connection');
	}

	if (((value & mask) >>> 0) !== value) {
		reader.refuse(`0x${value.toString(16)} has bits outside its mask 0x${mask.toString(16)}, so it can never match`);
	}

	return {value, mask};
}

interface Fields {
	has(key: string): boolean;
	get(key: string): Reader;
}

/** A value, and where it stands. */
class Reader {
	constructor(readonly value: unknown, readonly file: string, readonly path: string) {}

	refuse(problem: string): never {
		throw new InputError(this.path === '' ? this.file : `${this.file}: ${this.path}`, problem);
	}

	object(keys: readonly string[]): Fields {
		const {value} = this;
		if (typeof value !== 'object' || value === null || Array.isArray(value)) {
			return this.refuse(`expected a mapping with ${keys.join(', ')}, got ${describe(value)}`);
		}

		const stranger = Object.keys(value).find(key => !keys.includes(key));
		if (stranger !== undefined) {
			this.refuse(`'${stranger}' is not known here; known are ${keys.join(', ')}`);
		}

		const fields = value as Readonly<Record<string, unknown>>;
		return {
			has: key => fields[key] !== undefined && fields[key] !== null,
			get: key => new Reader(fields[key], this.file, this.path === '' ? key : `${this.path}.${key}`),
		};
	}

	list(): readonly Reader[] {
		if (!Array.isArray(this.value)) {
			return this.refuse(`expected a list, got ${describe(this.value)}`);
		}

		return this.value.map((item, index) => new Reader(item, this.file, `${this.path}[${index}]`));
	}

	text(): string {
		return typeof this.value === 'string' && this.value !== '' ? this.value : this.refuse(`expected text, got ${describe(this.value)}`);
	}

	integer(low: number, high: number): number {
		return typeof this.value === 'number' && Number.isInteger(this.value) && this.value >= low && this.value <= high
			? this.value
			: this.refuse(`expected an integer from ${low} to ${high}, got ${describe(this.value)}`);
	}

	boolean(): boolean {
		return typeof this.value === 'boolean' ? this.value : this.refuse(`expected true or false, got ${describe(this.value)}`);
	}

	/** A mapping of text to text, as labels and annotations are. */
	texts(): Readonly<Record<string, string>> {
		const {value} = this;
		if (typeof value !== 'object' || value === null || Array.isArray(value)) {
			return this.refuse(`expected a mapping, got ${describe(value)}`);
		}

		for (const [key, item] of Object.entries(value)) {
			if (typeof item !== 'string') {
				new Reader(item, this.file, `${this.path}['${key}']`).refuse(`expected text, got ${describe(item)}: put it in quotes`);
			}
		}

		return value as Readonly<Record<string, string>>;
	}

	oneOf<T extends string>(choices: readonly T[]): T {
		return choices.includes(this.value as T) ? this.value as T : this.refuse(`expected ${choices.join(' or ')}, got ${describe(this.value)}`);
	}

	absolutePath(): string {
		const text = this.text();
		return path.isAbsolute(text) && !text.includes('\0') ? text : this.refuse(`expected an absolute path, got ${describe(text)}`);
	}

	address(): string {
		const text = this.text();
		let address: string;
		try {
			address = canonicalAddress(text);
		} catch {
			return this.refuse(`expected an IP address, got ${describe(text)}`);
		}

		return address === '' || address === '0.0.0.0' ? this.refuse('expected an address that a connection can go to') : address;
	}
}

function describe(value: unknown): string {
	if (value === undefined || value === null) {
		return 'nothing';
	}

	if (Array.isArray(value)) {
		return 'a list';
	}

	return typeof value === 'object' ? 'a mapping' : JSON.stringify(value);
}
