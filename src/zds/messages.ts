/**
The messages between the agent and ztunnel: protobuf package `istio.workload.zds`, one message a packet. CAPTURE.md section 1 lists the fields.
*/
import {PbfReader, PbfWriter} from 'pbf';
import {PodError} from '../errors.js';

/** ztunnel reads no more of a packet. */
const MAX_PACKET_BYTES = 1024;
/** `enum Version { V1 = 1; }` */
export const VERSION_V1 = 1;
const PBF_VARINT = 0;
const PBF_BYTES = 2;

export interface WorkloadName {
	/** The pod's. */
	readonly uid: string;
	readonly name: string;
	readonly namespace: string;
	readonly serviceAccount: string;
}

/** `WorkloadRequest{snapshot_sent: {}}` */
export const SNAPSHOT_SENT: Uint8Array = encodeRequest(3, () => {});

/**
`WorkloadRequest{add: …}`, to be sent with the namespace's fd.

@throws PodError when ztunnel could not read it whole. What Kubernetes admits fits: uids have 36 characters, namespaces at most 63, pods and service accounts 253.
*/
export function encodeAdd({uid, name, namespace, serviceAccount}: WorkloadName): Uint8Array {
	const bytes = encodeRequest(1, add => {
		add.writeStringField(1, uid);
		add.writeMessage(2, (_, info) => {
			info.writeStringField(1, name);
			info.writeStringField(2, namespace);
			info.writeStringField(3, serviceAccount);
		}, undefined);
	});
	if (bytes.length > MAX_PACKET_BYTES) {
		const lengths = Object.entries({uid, name, namespace, 'service account': serviceAccount}).map(([what, text]) => `${what} ${Buffer.byteLength(text)}`);
		throw new PodError(`${namespace}/${name}`, `ztunnel cannot be told of it: the message has ${bytes.length} bytes of at most ${MAX_PACKET_BYTES} (${lengths.join(', ')}): shorten the longest of these names`);
	}

	return bytes;
}

/** `WorkloadRequest{keep: {uid}}` */
export function encodeKeep(uid: string): Uint8Array {
	return encodeRequest(5, keep => {
		keep.writeStringField(1, uid);
	});
}

/** `WorkloadRequest{del: {uid}}` */
export function encodeDelete(uid: string): Uint8Array {
	return encodeRequest(2, del => {
		del.writeStringField(2, uid);
	});
}

/**
`ZdsHello`

@returns its version, 0 when there is none.
@throws TypeError when it is none.
*/
export function decodeHello(bytes: Uint8Array): number {
	let version = 0;
	decode('ZdsHello', bytes, (field, reader) => {
		if (field === 1) {
			requireType(reader, PBF_VARINT);
			version = reader.readVarint();
		}
	});
	return version;
}

/**
`WorkloadResponse{ack: {error}}`

@returns the error, empty for success.
@throws TypeError when it is none.
*/
export function decodeAck(bytes: Uint8Array): string {
	let ack: Uint8Array | undefined;
	let error = '';
	decode('WorkloadResponse', bytes, (field, reader) => {
		if (field === 1) {
			requireType(reader, PBF_BYTES);
			ack = reader.readBytes();
		}
	});
	if (!ack) {
		throw new TypeError('the WorkloadResponse holds no Ack');
	}

	decode('Ack', ack, (field, reader) => {
		if (field === 1) {
			requireType(reader, PBF_BYTES);
			error = reader.readString();
		}
	});
	return error;
}

function encodeRequest(payload: number, write: (writer: PbfWriter) => void): Uint8Array {
	const writer = new PbfWriter();
	writer.writeMessage(payload, (_, inner) => {
		write(inner);
	}, undefined);
	return writer.finish();
}

/** Fields of other numbers are skipped, as protobuf wants it. */
function decode(message: string, bytes: Uint8Array, onField: (field: number, reader: PbfReader) => void): void {
	const reader = new PbfReader(bytes);
	try {
		reader.readFields(onField, reader);
	} catch (error) {
		throw new TypeError(`it is no ${message}`, {cause: error});
	}

	// pbf reads beyond the end, and stops at field number 0.
	if (reader.pos !== bytes.length) {
		throw new TypeError(`it is no ${message}: its fields do not end where it ends`);
	}
}

function requireType(reader: PbfReader, type: number): void {
	if (reader.type !== type) {
		throw new TypeError(`wire type ${reader.type}`);
	}
}
